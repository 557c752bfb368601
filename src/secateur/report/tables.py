"""The tables, notes and texts of a page."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.patterns.pattern import NM, Unstructured, parse_pattern
from secateur.report.format import fit_text, number_text, percent_text, seconds_text, width_text
from secateur.report.parts import Continuation, Continuations, Lines, Table
from secateur.report.run_files import Json, Run
from secateur.report.summary import DIGEST, digest_text, pattern_of
from secateur.runs.errors import SecateurError
from secateur.text.beginning import beginning_text, prompt_text

# More notes than that are folded.
_SHOWN_NOTES = 6
_Row = tuple[str, ...]

# Where a result runs, what to expect there, and why.
_DENSE = (
    "Dense kernels: transformers, vLLM, llama.cpp",
    "no faster, no smaller",
    "A zero is stored and multiplied like any other number. The file compresses well.",
)
_OPENVINO = (
    "OpenVINO, CPU with AMX",
    "possible at high sparsity",
    "Only with weights and activations in int8, so it has to be quantised first, with a quantiser "
    "that keeps zeros.",
)
_SPARSE_CORES = (
    "NVIDIA GPU with sparse tensor cores, torch's semi-structured kernels",
    "faster in large batches",
    "Long prompts and many sequences at once are bound by arithmetic, half of which is skipped. "
    "Writing one token at a time is bound by memory and may be slower.",
)
_OTHER_PATTERN = (
    "Sparse tensor cores",
    "no faster",
    "They take 2:4 alone; no common hardware has units for this pattern.",
)
_LOW_RANK = (
    "Everywhere",
    "slower by the low-rank products",
    "They are dense and come on top of the sparse linears.",
)
_UNEVEN = (
    "transformers, with trust_remote_code",
    "faster and smaller, on any device",
    "The matrices are smaller, and so is the cache where key-value groups went. Embeddings and "
    "head are as they were.",
)
_UNEVEN_ELSEWHERE = (
    "Runtimes with a code of their own for each family",
    "not without work",
    "Blocks differ in width; most expect one width for all. Shrink with --uniform for those.",
)
_UNIFORM = (
    "Everywhere the dense model runs",
    "faster and smaller, on any device",
    "An ordinary model of the family with smaller matrices. Embeddings and head are as they were.",
)
_PADDED = ("Everywhere", "no faster, no smaller", "The files hold zeros in place of what went.")


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """Evaluations, those of one protocol in one table, and held-out losses of training."""
    protocols: dict[str, dict[_Row, None]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            rows = protocols.setdefault(_protocol(evaluation), {})
            # The same dense model is named once.
            for name, part in (("dense", "dense"), (run.label, "model")):
                if row := _evaluated(name, evaluation, part):
                    rows[row] = None
    head = ["", "perplexity", "95 % interval", "per word", "KL from dense", "top-1 agreement"]
    tables = [
        Table("Perplexity", head, sorted(rows, key=lambda row: row[0] != "dense"), protocol)
        for protocol, rows in protocols.items()
        if rows
    ]
    tables += _zero_shot_tables(runs)
    held_out = [_held_out(run) for run in runs if run.kind in ("train", "recover")]
    if any(held_out):
        tables.append(
            Table(
                "Held-out loss of training, nats per token",
                ["", "dense", "before", "after", "windows"],
                [row for row in held_out if row],
                "Mean negative log-likelihood of windows that were not trained on; before: of the "
                "model as it came in, with its first masks; after: of the saved files.",
            )
        )
    return tables


def _protocol(evaluation: Json) -> str:
    """Everything that decides which figures may be compared."""
    protocol = evaluation.at("protocol")
    words = [
        protocol.text("text") or "unknown text",
        f"{number_text(protocol.number('windows'))} windows of "
        f"{number_text(protocol.number('window'))} tokens, no overlap",
        f"{protocol.text('forward_dtype') or 'unknown dtype'} on {protocol.text('device') or '?'}",
        beginning_text(protocol.text("bos")),
        digest_text(protocol.text("text_sha256")),
    ]
    return ", ".join(filter(None, words))


def _evaluated(name: str, evaluation: Json, part: str) -> _Row:
    figures = evaluation.at(part)
    if not figures:
        return ()
    low, high = figures.number("interval", 0), figures.number("interval", 1)
    distance = evaluation.at("divergence") if part == "model" else Json()
    return (
        name,
        number_text(figures.number("perplexity"), "{:.2f}"),
        "" if low is None or high is None else f"{low:.2f} – {high:.2f}",
        number_text(figures.number("word_perplexity"), "{:.2f}"),
        number_text(distance.number("kl"), "{:.4f} nats"),
        percent_text(distance.number("top1_agreement"), 1),
    )


def _zero_shot_tables(runs: Sequence[Run]) -> list[Table]:
    """Accuracies on tasks: a row for each task, a column for each model; one table a protocol."""
    protocols: dict[str, dict[str, Json]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            found = evaluation.at("zero_shot")
            protocol = (
                f"Shares of right answers and their standard errors, {_zero_shot_protocol(found)}. "
                "Norm.: by length of the answer."
            )
            for name, part in (("dense", "dense"), (run.label, "model")):
                if scores := found.at(part):
                    protocols.setdefault(protocol, {})[name] = scores
    tables = []
    for protocol, models in protocols.items():
        # The dense model stands first, as it does everywhere.
        ordered = dict(sorted(models.items(), key=lambda model: model[0] != "dense"))
        tasks = dict.fromkeys(task for each in ordered.values() for task, _ in each.pairs("tasks"))
        rows = [
            (task + norm, *cells)
            for task in tasks
            for kind, norm in (("acc", ""), ("acc_norm", ", norm."))
            if any(cells := [_score(each.at("tasks", task), kind) for each in ordered.values()])
        ]
        means = [_score(each, "mean_acc") for each in ordered.values()]
        tables.append(Table("Zero-shot", ["", *ordered], [*rows, ("mean acc", *means)], protocol))
    return tables


def _zero_shot_protocol(found: Json) -> str:
    limit = number_text(found.number("limit"), "the first {:.0f} of each task")
    data = dict.fromkeys((each.text() or "?")[:DIGEST] for _, each in found.pairs("data"))
    return (
        f"lm-eval {found.text('lm_eval') or '?'}, {limit or 'all questions'}, "
        f"{prompt_text(found.text('bos'))}, {found.text('forward_dtype') or 'unknown dtype'}, "
        f"data: {', '.join(data) or '?'}"
    )


def _score(scores: Json, kind: str) -> str:
    value, error = scores.number(kind), scores.number(f"{kind}_stderr")
    if value is None or error is None:
        return percent_text(value, 1)
    return f"{percent_text(value, 1)} ± {100 * error:.1f}"


def _held_out(run: Run) -> _Row:
    validation = run.report.at("validation")
    if not validation:
        return ()
    windows, length = (number_text(validation.number(key)) for key in ("windows", "length"))
    losses = (validation.number(key) for key in ("dense", "before", "after"))
    return (
        run.label,
        *(number_text(loss, "{:.4f}") for loss in losses),
        f"{windows} × {length} tokens",
    )


def speed_table(run: Run) -> Table | None:
    """Where the result of a run should be faster; None if that was measured, or cannot be."""
    if run.benches:
        return None
    rows = _shrunk(run.report) if run.kind == "shrink" else _sparse(run)
    if not rows:
        return None
    caption = "Nothing here was measured; do so where it will run."
    return Table("", ["where", "expected", "why"], rows, caption, style="words")


def _sparse(run: Run) -> list[_Row]:
    if run.kind not in ("prune", "train"):
        return []
    rows = [_DENSE]
    try:
        pattern = parse_pattern(pattern_of(run) or "")
    except SecateurError:
        pattern = None
    match pattern:
        case NM(n=2, m=4):
            rows.append(_SPARSE_CORES)
        case NM():
            rows.append(_OTHER_PATTERN)
        case Unstructured():
            rows.append(_OPENVINO)
        case _:
            pass
    return [*rows, _LOW_RANK] if run.report.at("low_rank") else [*rows]


def _shrunk(report: Json) -> list[_Row]:
    form = report.text("options", "form")
    if form == "padded":
        return [_PADDED]
    where, expected, why = _UNIFORM if form == "uniform" else _UNEVEN
    if removed := percent_text(report.number("parameters", "removed"), 1):
        why = f"{removed} of the blocks' parameters are gone. {why}"
    rows = [(where, expected, why), *([] if form == "uniform" else [_UNEVEN_ELSEWHERE])]
    return [*rows, *(row for each in report.items("formats") if (row := _format_row(each)))]


def _format_row(found: Json) -> _Row:
    """What a quantised format holds of a shrunk model; nothing if that is not known."""
    fit, before, linears = (found.number(key) for key in ("fit", "fit_dense", "linears"))
    multiple, name = number_text(found.number("multiple"), "{:.0f}"), found.text("name")
    if name is None or fit is None or before is None or linears is None:
        return ()
    why = f"It needs multiples of {multiple}; of the dense model it {fit_text(before, linears)}."
    return name, fit_text(fit, linears), why


def simulation_table(run: Run) -> Table | None:
    """Cycles on the simulated accelerator, if somebody had them counted."""
    simulation = run.simulation
    formulas = [
        name for name in ("corrected", "released") if simulation.at("total", "cycles", name)
    ]
    if not formulas:
        return None
    columns = [
        (name, key, form)
        for name in formulas
        for key, form in (("dense", "{:,.0f}"), ("speed_up", "{:.2f}"))
    ]
    rows = [
        (
            each.text("name") or "?",
            *(number_text(each.number("cycles", name, key), form) for name, key, form in columns),
        )
        for each in (*simulation.items("projections"), simulation.at("total"))
        if each
    ]
    head = ["", *(f"{part}, {name}" for name in formulas for part in ("dense cycles", "speed-up"))]
    width, height = (simulation.number("accelerator", side) for side in ("width", "height"))
    array = "" if not width or not height else f", {width:.0f} × {height:.0f} multipliers"
    caption = (
        f"Cycles for one token on a modelled accelerator that skips zeros{array}; not the time of "
        "a machine you own. By two formulas, which are not comparable."
    )
    return Table("", head, rows, caption)


def _folded(rows: Sequence[_Row], *head: str) -> Table | None:
    return Table("", head, rows, folded=True) if rows else None


def block_table(run: Run) -> Table | None:
    """Every block of a pruned model."""
    rows = []
    for position, block in enumerate(run.report.items("blocks") if run.kind == "prune" else []):
        linears = dict(block.pairs("linears"))
        zeros = sum(linear.number("zeros") or 0 for linear in linears.values())
        weights = sum(linear.number("weights") or 0 for linear in linears.values())
        errors = {
            name: error
            for name, linear in linears.items()
            if (error := linear.number("relative_error")) is not None
        }
        worst = max(errors, key=errors.__getitem__) if errors else ""
        rows.append(
            (
                number_text(block.number("index") or position, "{:.0f}"),
                percent_text(zeros / weights, 2) if weights else "",
                number_text(block.number("held_out_error"), "{:.4f}"),
                worst,
                number_text(errors.get(worst), "{:.4f}"),
                seconds_text(sum(each.number() or 0 for _, each in block.pairs("seconds"))),
            )
        )
    return _folded(rows, "block", "sparsity", "held-out error", "worst linear", "its error", "time")


def width_table(run: Run) -> Table | None:
    """Every sub-block of a shrunk model."""
    numbers = ("penalty", "next_penalty", "error_without_refit", "held_out_error")
    rows = [
        (
            f"{number_text(each.number('block'), '{:.0f}')} {each.text('kind') or ''}",
            _width(each, "kept", "queries"),
            _width(each, "of", "queries_of"),
            *(number_text(each.number(key), "{:.4f}") for key in numbers),
        )
        for each in run.report.items("sub_blocks")
    ]
    return _folded(
        rows, "sub-block", "kept", "of", "expected KL", "if narrower", "without refit", "error"
    )


def _width(sub_block: Json, units: str, queries: str) -> str:
    count = sub_block.number(units)
    if count is None:
        return ""
    return width_text(count, sub_block.number(queries), sub_block.number("queries_of"))


def curve_table(run: Run) -> Table | None:
    """Every size of a curve."""
    rows = [
        (
            percent_text(point.number("removed"), 1),
            number_text(point.number("blocks_after"), "{:,.0f}"),
            number_text(point.number("divergence"), "{:.4f}"),
            str(sum(width.number() == 0 for _, width in point.pairs("widths"))),
        )
        for point in run.report.items("points")
        if run.kind == "curve"
    ]
    return _folded(
        rows, "removed", "parameters left in blocks", "expected KL, nats", "sub-blocks gone"
    )


def notes(run: Run) -> Lines | None:
    """What the run wants to be known."""
    lines = run.report.texts("notes")
    for position, block in enumerate(run.report.items("blocks")):
        index = block.number("index")
        name = f"{position if index is None else index:.0f}"
        lines += [f"block {name}: {note}" for note in block.texts("notes")]
    for evaluation in run.evaluations:
        lines += evaluation.texts("notes")
    lines += [f"{name} beside the report is no readable JSON." for name in run.unread]
    return Lines("", lines, folded=len(lines) > _SHOWN_NOTES) if lines else None


def continuations(run: Run) -> Continuations | None:
    """How the dense and the pruned model go on with the same texts."""
    found = run.continuations
    entries = []
    for each in found.items("continuations"):
        dense, pruned = (each.at(name).value for name in ("dense", "pruned"))
        prompt = each.text("prompt")
        if prompt and isinstance(dense, str) and isinstance(pruned, str):
            # The space before the first word belongs to the prompt.
            dense, pruned = (text.lstrip("\n").removeprefix(" ") for text in (dense, pruned))
            pairs = enumerate(zip(dense, pruned, strict=False))
            shorter = min(len(dense), len(pruned))
            same = next((at for at, (one, other) in pairs if one != other), shorter)
            entries.append(Continuation(prompt, dense[:same], dense[same:], pruned[same:]))
    if not entries:
        return None
    caption = (
        f"The likeliest token each time, {number_text(found.number('tokens'), '{:.0f}')} tokens at "
        f"most, no chat template, {found.text('dtype') or 'unknown dtype'} on "
        f"{found.text('device') or '?'}. Dense: {found.text('reference') or '?'}. What both write "
        "alike is grey."
    )
    return Continuations("", entries, caption)
