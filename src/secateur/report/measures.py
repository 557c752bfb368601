"""The numbers of runs, with the protocols they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from secateur.report.content import KeyFigure, Table
from secateur.report.description import DIGEST
from secateur.report.facts import Facts
from secateur.report.format import (
    bytes_text,
    count_text,
    number_text,
    percent_text,
    seconds_text,
)
from secateur.report.runs import Run

# Key figures that stand behind all others.
COSTS = ("time", "peak memory")


def key_figures(run: Run) -> list[KeyFigure]:
    """The numbers that matter most; equal labels of several runs may be compared."""
    return [*_own_figures(run), *_evaluated_figures(run), *_cost_figures(run)]


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """Evaluations, those of one protocol in one table."""
    protocols: dict[str, dict[tuple[str, ...], None]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            rows = protocols.setdefault(_protocol(evaluation), {})
            # The same dense model is named once.
            for name, part in (("dense", "dense"), (run.label, "model")):
                if (row := _evaluated(name, evaluation, part)) is not None:
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


def _zero_shot_tables(runs: Sequence[Run]) -> list[Table]:
    """Accuracies on tasks: a row for each task, a column for each model; one table a protocol."""
    protocols: dict[str, dict[str, Facts]] = {}
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
        rows = [
            (f"{task}{', norm.' if kind == 'acc_norm' else ''}", *cells)
            for task in dict.fromkeys(
                t for each in ordered.values() for t, _ in each.pairs("tasks")
            )
            for kind in ("acc", "acc_norm")
            if any(cells := [_score(each.at("tasks", task), kind) for each in ordered.values()])
        ]
        means = [_score(each, "mean_acc") for each in ordered.values()]
        tables.append(Table("Zero-shot", ["", *ordered], [*rows, ("mean acc", *means)], protocol))
    return tables


def _zero_shot_protocol(found: Facts) -> str:
    limit, version = found.number("limit"), found.text("lm_eval")
    data = dict.fromkeys((each.text() or "?")[:DIGEST] for _, each in found.pairs("data"))
    return (
        f"lm-eval {version or '?'}, "
        f"{'all questions' if limit is None else f'the first {limit:.0f} of each task'}, "
        f"{found.text('forward_dtype') or 'unknown dtype'}, data: {', '.join(data) or '?'}"
    )


def _score(scores: Facts, kind: str) -> str:
    value, error = scores.number(kind), scores.number(f"{kind}_stderr")
    if value is None:
        return ""
    return percent_text(value, 1) + ("" if error is None else f" ± {100 * error:.1f}")


def _own_figures(run: Run) -> Iterator[KeyFigure]:
    """What the run itself says of its result."""
    report = run.report
    if (counted := report.number("sparsity", "counted")) is not None:
        zeros, weights = report.number("sparsity", "zeros"), report.number("sparsity", "weights")
        counts = "" if zeros is None or weights is None else f"{zeros:,.0f} of {weights:,.0f}"
        yield KeyFigure("zeros in the linears, counted", percent_text(counted, 2), counts)
    errors = [block.number("held_out_error") for block in report.items("blocks")]
    known = [error for error in errors if error is not None]
    if known:
        yield KeyFigure("mean error of a block", f"{fmean(known):.4f}", "relative, held-out tokens")
    if run.kind == "shrink":
        yield from _shrunk_figures(report)
    if run.kind in ("train", "recover"):
        yield from _trained_figures(report, report.at("network") or report)


def _shrunk_figures(report: Facts) -> Iterator[KeyFigure]:
    parameters = report.at("parameters")
    if (removed := parameters.number("removed")) is not None:
        before, after = parameters.number("blocks_before"), parameters.number("blocks_after")
        known = before is not None and after is not None
        sizes = f"{count_text(before or 0)} to {count_text(after or 0)}" if known else ""
        yield KeyFigure("removed from the blocks", percent_text(removed, 2), sizes)
    before, after = parameters.number("model_before"), parameters.number("model_after")
    if before is not None and after is not None:
        yield KeyFigure("parameters in files", count_text(after), f"dense {count_text(before)}")
    if (expected := report.number("survey", "predicted_divergence")) is not None:
        yield KeyFigure("expected KL", f"{expected:.4f}", "nats per token, by a fit to sub-models")


def _trained_figures(report: Facts, steps_of: Facts) -> Iterator[KeyFigure]:
    validation = report.at("validation")
    if (after := validation.number("after")) is not None:
        others = {key: validation.number(key) for key in ("before", "dense")}
        known = [f"{key} {loss:.4f}" for key, loss in others.items() if loss is not None]
        yield KeyFigure("held-out loss, nats per token", f"{after:.4f}", ", ".join(known))
    if (tokens := steps_of.number("tokens")) is not None:
        steps = steps_of.number("steps")
        beside = "" if steps is None else f"in {steps:,.0f} steps"
        yield KeyFigure("tokens trained on", f"{tokens:,.0f}", beside)


def _evaluated_figures(run: Run) -> Iterator[KeyFigure]:
    for evaluation in run.evaluations:
        protocol = _short_protocol(evaluation)
        if (perplexity := evaluation.number("model", "perplexity")) is not None:
            dense = evaluation.number("dense", "perplexity")
            beside = "" if dense is None else f"dense {dense:.2f}"
            yield KeyFigure("perplexity", f"{perplexity:.2f}", beside, protocol)
        accuracy = evaluation.number("zero_shot", "model", "mean_acc")
        if accuracy is not None:
            dense = evaluation.number("zero_shot", "dense", "mean_acc")
            beside = "" if dense is None else f"dense {percent_text(dense, 1)}"
            tasks = [task for task, _ in evaluation.pairs("zero_shot", "model", "tasks")]
            limit = evaluation.number("zero_shot", "limit")
            first = "" if limit is None else f", first {limit:.0f} of each"
            questions = f"{', '.join(tasks)}{first}"
            yield KeyFigure("mean accuracy", percent_text(accuracy, 1), beside, questions)
        if (kl := evaluation.number("divergence", "kl")) is not None:
            yield KeyFigure("KL from dense", f"{kl:.4f}", "nats per token", protocol)


def _cost_figures(run: Run) -> Iterator[KeyFigure]:
    report = run.report
    seconds = report.number("seconds", "total")
    if seconds is None:
        seconds = report.number("seconds")
    if seconds is not None:
        cores, device = report.number("machine", "cores"), report.text("machine", "device")
        place = f"on {device}" if device and device != "cpu" else ""
        yield KeyFigure(
            COSTS[0], seconds_text(seconds), place or (f"on {cores:.0f} cores" if cores else "")
        )
    if (peak := report.number("peak_memory_bytes")) is not None:
        device_peak = report.number("peak_device_memory_bytes")
        beside = "" if device_peak is None else f"{bytes_text(device_peak)} on the device"
        yield KeyFigure(COSTS[1], bytes_text(peak), beside)


def _protocol(evaluation: Facts) -> str:
    """Everything that decides which figures may be compared."""
    protocol = evaluation.at("protocol")
    digest = protocol.text("text_sha256")
    words = [
        protocol.text("text") or "unknown text",
        f"{number_text(protocol.number('windows'))} windows of "
        f"{number_text(protocol.number('window'))} tokens, no overlap",
        f"{protocol.text('forward_dtype') or 'unknown dtype'} on {protocol.text('device') or '?'}",
        f"beginning-of-text token: {protocol.text('bos') or 'unknown'}",
    ]
    return ", ".join([*words, *([f"sha256 {digest[:DIGEST]}…"] if digest else [])])


def _short_protocol(evaluation: Facts) -> str:
    protocol = evaluation.at("protocol")
    windows, window = protocol.number("windows"), protocol.number("window")
    sizes = f"{number_text(windows)} × {number_text(window)} tokens"
    return f"{protocol.text('text') or 'unknown text'}, {sizes}"


def _evaluated(name: str, evaluation: Facts, part: str) -> tuple[str, ...] | None:
    figures = evaluation.at(part)
    if not figures:
        return None
    low, high = figures.number("interval", 0), figures.number("interval", 1)
    distance = evaluation.at("divergence") if part == "model" else Facts()
    agreement = distance.number("top1_agreement")
    return (
        name,
        number_text(figures.number("perplexity"), "{:.2f}"),
        "" if low is None or high is None else f"{low:.2f} – {high:.2f}",
        number_text(figures.number("word_perplexity"), "{:.2f}"),
        number_text(distance.number("kl"), "{:.4f} nats"),
        "" if agreement is None else percent_text(agreement, 1),
    )


def _held_out(run: Run) -> tuple[str, ...]:
    validation = run.report.at("validation")
    if not validation:
        return ()
    windows, length = validation.number("windows"), validation.number("length")
    return (
        run.label,
        *(number_text(validation.number(key), "{:.4f}") for key in ("dense", "before", "after")),
        f"{number_text(windows)} × {number_text(length)} tokens",
    )
