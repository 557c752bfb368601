"""Tables for the terminal; nothing that a user or a file named is markup in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.models.inspection import Inspection
from secateur.patterns.plan import Plan
from secateur.report.documents.evaluation import Evaluation, Figures, Protocol, ZeroShot
from secateur.report.documents.prune import Estimate, LinearReport, Report, SparsityReport
from secateur.report.documents.run import RunReport
from secateur.report.documents.shrink import ShrinkReport, SizeCurve, SubBlockReport
from secateur.report.documents.training import RecoveryReport, TrainingReport
from secateur.report.format import bytes_text, fit_text, linear_kind, seconds_text, width_text
from secateur.runs.errors import printable
from secateur.text.beginning import beginning_text, prompt_text

# Blocks whose sparsities differ by more than this were not pruned evenly.
_UNEVEN = 0.005
_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN_NOTES = 8
# Metrics of zero-shot tasks, and their standard errors.
_METRICS = {"acc": "acc_stderr", "acc_norm": "acc_norm_stderr"}
_ROWS = "rows from 0 to 100 %"
# Losses of a step of training.
_LOSSES = ("cross_entropy", "divergence")
# Columns of words; all others are numbers.
_WORDS = {
    *("", "form", "linear", "model", "patterns", "projection", "runtime", "task", "verdict"),
    *("what", "work", "worst linear", _ROWS),
}


def new_table(*columns: str, title: str | None = None) -> Table:
    """A table with columns of numbers to the right and columns of words to the left."""
    table = Table(box=None, header_style="dim", pad_edge=False, title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in _WORDS else "right")
    return table


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """Add cells whose brackets are brackets, and whose control characters do nothing."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def _summary(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        add_row(table, *row)
    return table


def _note(text: str) -> Text:
    return Text(f"· {printable(text)}", style="dim")


def _time(report: RunReport) -> tuple[str, str]:
    return "time", f"{seconds_text(report.seconds['total'])} on {report.machine.cores} cores"


def _memory(report: RunReport) -> tuple[str, str]:
    text = bytes_text(report.peak_memory_bytes)
    if report.peak_device_memory_bytes is not None:
        text += f", {bytes_text(report.peak_device_memory_bytes)} on {report.machine.device}"
    return "peak memory", text


def _stages(report: Report) -> str:
    return " + ".join(str(stage["method"]) for stage in report.recipe["stages"])


def report_table(report: Report) -> RenderableType:
    """What a run did: the blocks, then the sums."""
    sparsities: list[float] = []
    table = new_table("block", "sparsity", "held-out error", "worst linear", "its error", "time")
    for block in report.blocks:
        zeros = sum(linear.zeros for linear in block.linears.values())
        weights = sum(linear.weights for linear in block.linears.values())
        errors = {name: linear.relative_error or 0.0 for name, linear in block.linears.items()}
        worst = max(errors, key=errors.__getitem__)
        sparsities.append(zeros / weights)
        add_row(
            table,
            str(block.index),
            f"{sparsities[-1]:.4f}",
            f"{block.held_out_error:.4f}",
            worst,
            f"{errors[worst]:.4f}",
            f"{sum(block.seconds.values()):.1f} s",
        )
    lowest, highest = min(sparsities), max(sparsities)
    parts: list[RenderableType] = [table, Text()]
    if highest - lowest > _UNEVEN or _rows_differ(report):
        parts += [_rates_table(report), Text()]

    def sums() -> Iterator[tuple[str, str]]:
        counted, allocation = report.sparsity, report.recipe["allocation"]["method"]
        yield "recipe", f"{_stages(report)}, pattern {report.recipe['pattern']}"
        if allocation != "uniform":
            yield "allocation", f"{allocation}, blocks from {lowest:.4f} to {highest:.4f}"
        rounded = f", {counted.rounded_to_zero:,} by rounding" if counted.rounded_to_zero else ""
        counts = f"({counted.zeros:,} of {counted.weights:,}{rounded})"
        yield "sparsity", f"{counted.counted:.6f} counted {counts}"
        yield from _left(counted)
        yield _calibration(report.calibration)
        yield _time(report)
        yield _memory(report)

    notes = [f"block {block.index}: {note}" for block in report.blocks for note in block.notes]
    if len(notes) > _SHOWN_NOTES:
        notes[_SHOWN_NOTES:] = [f"{len(notes) - _SHOWN_NOTES} more in report.json"]
    return Group(*parts, _summary(sums()), Text(), *map(_note, notes))


def _rows_differ(report: Report) -> bool:
    """Whether rows of one linear lie in classes that are not next to each other."""
    return any(
        sum(count > 0 for count in linear.rows) > 2
        for block in report.blocks
        for linear in block.linears.values()
    )


def _rates_table(report: Report) -> RenderableType:
    """Where the zeros went: for each kind of linear, over all blocks."""
    table = new_table("linear", "mean sparsity", "lowest", "highest", _ROWS)
    kinds: dict[str, list[LinearReport]] = {}
    for block in report.blocks:
        for name, linear in block.linears.items():
            kinds.setdefault(linear_kind(name), []).append(linear)
    for kind, linears in kinds.items():
        sparsities = [linear.sparsity for linear in linears]
        mean = sum(linear.zeros for linear in linears) / sum(linear.weights for linear in linears)
        rows = [sum(counts) for counts in zip(*(linear.rows for linear in linears), strict=True)]
        shares = (mean, min(sparsities), max(sparsities))
        add_row(table, kind, *(f"{share:.3f}" for share in shares), _bars(rows))
    return table


def _bars(counts: Sequence[int]) -> str:
    """A histogram in one line."""
    highest = max(*counts, 1)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // highest)] for count in counts)


def shrink_table(report: ShrinkReport) -> RenderableType:
    """What is left of each block, groups × query heads and channels, then the sums."""
    table = new_table("block", "attention groups", "feed-forward channels")
    blocks: dict[int, dict[str, SubBlockReport]] = {}
    for sub_block in report.sub_blocks:
        blocks.setdefault(sub_block.block, {})[sub_block.kind] = sub_block
    for index, parts in blocks.items():
        widths = [parts.get(kind) for kind in ("attention", "ffn")]
        add_row(table, str(index), *("all" if each is None else _width(each) for each in widths))

    def sums() -> Iterator[tuple[str, str]]:
        counted, latency = report.parameters, report.latency
        left = f"{counted.blocks_after:,} of {counted.blocks_before:,} parameters left"
        yield "blocks", f"{left}, {counted.removed:.4%} removed"
        yield "in files", f"{counted.model_after:,} of {counted.model_before:,} parameters"
        for each in report.formats:
            yield each.name, fit_text(each.fit, each.linears)
        if latency is not None:
            yield (
                "expected speed",
                f"{1e3 * latency.before:.1f} to {1e3 * latency.expected:.1f} ms for "
                f"{latency.tokens} tokens through the blocks",
            )
        yield _calibration(report.calibration)
        yield "forward passes", f"{report.forward_tokens:,} tokens"
        yield _time(report)

    return Group(table, Text(), _summary(sums()), Text())


def _width(sub_block: SubBlockReport) -> str:
    dense = sub_block.queries_of
    left = width_text(sub_block.kept, sub_block.queries, dense)
    return f"{left} of {width_text(sub_block.of, dense, dense)}"


def curve_table(curve: SizeCurve) -> RenderableType:
    """Sizes and what each is expected to cost."""
    table = new_table(
        "removed", "parameters left in blocks", "expected KL, nats", "sub-blocks gone"
    )
    for point in curve.points:
        gone = sum(width == 0 for width in point.widths.values())
        left, divergence = f"{point.blocks_after:,}", f"{point.divergence:.4f}"
        add_row(table, f"{point.removed:.1%}", left, divergence, str(gone))
    return Group(table, Text(), _summary([_calibration(curve.calibration)]), Text())


def training_table(report: TrainingReport) -> RenderableType:
    """What training did: the curve, then the sums."""
    curve = new_table("step", "text, nats", "KL, nats", "flips", "held out, nats")
    for validation in report.validations:
        step = int(validation["step"])
        near = next((each for each in reversed(report.curve) if each["step"] <= step), None)
        add_row(
            curve,
            str(step),
            *(["", ""] if near is None else (f"{near[key]:.3f}" for key in _LOSSES)),
            f"{near['flip_rate']:.2%}" if near and "flip_rate" in near else "",
            f"{validation['validation_loss']:.4f}",
        )

    def sums() -> Iterator[tuple[str, str]]:
        held_out, counted, low_rank = report.validation, report.sparsity, report.low_rank
        if report.start is not None:
            spent = seconds_text(report.start.seconds["total"])
            yield "start", f"{_stages(report.start)}, {spent}"
        dense = "" if held_out.dense is None else f", dense {held_out.dense:.4f}"
        yield "held-out loss", f"{held_out.before:.4f} to {held_out.after:.4f}{dense}"
        zeros = f"({counted.zeros:,} of {counted.weights:,})"
        yield "sparsity", f"{counted.counted:.6f} counted {zeros}"
        yield from _left(counted)
        if low_rank is not None:
            parameters = f"{low_rank.parameters:,} dense parameters more"
            yield "low rank", f"{parameters} ({low_rank.share:.1%})"
        yield "tokens", f"{report.tokens:,} in {report.steps:,} steps"
        yield from _windows(report)
        yield _time(report)
        yield _memory(report)

    return Group(curve, Text(), _summary(sums()))


def recovery_table(report: RecoveryReport) -> RenderableType:
    """What recovery did: held-out loss from step to step, then the sums."""
    held_out, network = report.validation, report.network
    curve = new_table("after", "held out, nats")
    losses = [("cut", held_out.before)]
    if held_out.after_blocks is not None:
        losses.append(("blocks", held_out.after_blocks))
    steps = network.validations[1:] if network else []
    losses += [(f"step {int(each['step'])}", each["validation_loss"]) for each in steps]
    for place, loss in losses:
        add_row(curve, place, f"{loss:.4f}")

    def sums() -> Iterator[tuple[str, str]]:
        after, dense = f"{held_out.after:.4f}", f"{held_out.dense:.4f}"
        yield "held-out loss", f"{held_out.before:.4f} to {after}, dense {dense}"
        if blocks := report.blocks:
            before = sum(each.before for each in blocks) / len(blocks)
            fitted = sum(each.after for each in blocks) / len(blocks)
            yield "error of blocks", f"{before:.4f} to {fitted:.4f}, mean"
        yield from _windows(report)
        if network is not None:
            yield "tokens", f"{network.tokens:,} in {network.steps:,} steps"
            yield "chosen", f"step {network.chosen_step}"
        if network is not None and (adapters := network.adapters) is not None:
            yield "adapters", f"rank {adapters.rank}, {adapters.parameters:,} parameters"
        yield _time(report)
        yield _memory(report)

    return Group(curve, Text(), _summary(sums()))


def _calibration(text: dict[str, Any]) -> tuple[str, str]:
    source = text["source"]
    named = source if isinstance(source, str) else " + ".join(source)
    windows = f"{text['samples']} windows of {text['length']} tokens"
    return "calibration", f"{named}, {windows}, {beginning_text(text['bos'])}"


def _windows(report: TrainingReport | RecoveryReport) -> Iterator[tuple[str, str]]:
    """What windows of text were like, and whether texts were not tokenised anew."""
    text, length = report.text, report.validation.length
    yield "windows", f"{length:,} tokens, {beginning_text(text.get('bos'))}"
    parts = text.get("parts", [])
    if taken := sum(part.get("cache") == "taken" for part in parts):
        yield "text", f"tokens of {taken} of {len(parts)} sources from the cache"


def _left(counted: SparsityReport) -> Iterator[tuple[str, str]]:
    """Say so if linears were left as they are."""
    if counted.left_dense and counted.overall is not None:
        yield "left dense", f"{counted.left_dense} linears; {counted.overall:.6f} over all linears"


def plan_table(plan: Plan) -> RenderableType:
    """Sparsity of every linear, then all together."""
    table = new_table("linear", "weights", "zeros", "sparsity")
    for name, weights in plan.weights.items():
        zeros = plan.zeros[name]
        add_row(table, name, f"{weights:,}", f"{zeros:,}", f"{zeros / weights:.4f}")
    table.add_section()
    weights, zeros = sum(plan.weights.values()), sum(plan.zeros.values())
    add_row(table, "all", f"{weights:,}", f"{zeros:,}", f"{plan.sparsity:.6f}", style="bold")
    if plan.left:
        total = weights + plan.left_weights
        name = f"with {plan.left} left dense"
        add_row(table, name, f"{total:,}", f"{zeros:,}", f"{zeros / total:.6f}", style="bold")
    return table


def inspection_table(inspection: Inspection) -> RenderableType:
    """Zeros of every linear, then the sum."""
    table = new_table("linear", "shape", "zeros", "sparsity", "patterns")
    for linear in inspection.linears:
        shape, zeros = " x ".join(map(str, linear.shape)), f"{linear.zeros:,}"
        add_row(
            table, linear.name, shape, zeros, f"{linear.sparsity:.4f}", ", ".join(linear.patterns)
        )
    table.add_section()
    zeros, patterns = f"{inspection.zeros:,}", ", ".join(inspection.patterns)
    add_row(table, "all", "", zeros, f"{inspection.sparsity:.6f}", patterns, style="bold")
    if 0 < inspection.dense < len(inspection.linears):
        name, patterns = f"without {inspection.dense} dense", ", ".join(inspection.pruned_patterns)
        sparsity = f"{inspection.pruned_sparsity:.6f}"
        add_row(table, name, "", "", sparsity, patterns, style="bold")
    fits = ((each.name, fit_text(each.fit, each.linears)) for each in inspection.formats)
    return Group(table, Text(), _summary(fits), Text())


def estimate_table(estimate: Estimate) -> RenderableType:
    """What a run would need."""
    rows = {
        "model": f"{estimate.blocks} blocks, {estimate.weights:,} weights in their linears",
        "zeros": f"{estimate.zeros:,} ({estimate.zeros / estimate.weights:.4f})",
        **({"left dense": f"{estimate.left_dense} linears"} if estimate.left_dense else {}),
        "peak memory": f"about {bytes_text(estimate.peak_memory_bytes)}",
        "hidden states": f"{bytes_text(estimate.activation_bytes)} ({estimate.activations_in})",
        "work": f"{estimate.forward_flops / 1e12:,.1f} TFLOP forward passes, "
        f"{estimate.statistics_flops / 1e12:,.1f} TFLOP statistics",
        "disk": f"{bytes_text(estimate.output_bytes)} for the result",
    }
    return _summary(rows.items())


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Perplexities and accuracies with their protocol, dense beside pruned."""
    parts: list[RenderableType] = []
    if evaluation.model is not None and evaluation.protocol is not None:
        parts += _perplexity_lines(evaluation, evaluation.model, evaluation.protocol)
    if evaluation.zero_shot is not None:
        parts += [*([Text()] if parts else []), *_task_lines(evaluation.zero_shot)]
    return Group(*parts, *map(_note, evaluation.notes))


def _perplexity_lines(
    evaluation: Evaluation, model: Figures, protocol: Protocol
) -> list[RenderableType]:
    table = new_table(
        "", "perplexity", "95 % interval", "per word", "KL from dense", "top-1 agreement"
    )
    for label, figures in (("dense", evaluation.dense), ("model", model)):
        if figures is None:
            continue
        distance = evaluation.divergence if label == "model" else None
        add_row(
            table,
            label,
            f"{figures.perplexity:.2f}",
            _interval(figures.interval),
            "" if figures.word_perplexity is None else f"{figures.word_perplexity:.2f}",
            f"{distance.kl:.4f} nats" if distance else "",
            f"{100 * distance.top1_agreement:.1f} %" if distance else "",
        )
    if (paired := evaluation.difference) is not None:
        interval = _interval(paired.perplexity_interval)
        add_row(table, "dense - model", f"{paired.perplexity:.2f}", interval)
    line = (
        f"{protocol.text}, {protocol.windows} windows of {protocol.window} tokens, no overlap, "
        f"{beginning_text(protocol.bos)}, {protocol.forward_dtype} on {protocol.device}; "
        f"weights {model.weights_dtype}"
    )
    return [table, Text(line, style="dim")]


def _task_lines(zero_shot: ZeroShot) -> list[RenderableType]:
    models = [("dense ", zero_shot.dense), ("", zero_shot.model)]
    shown = [(label, scores) for label, scores in models if scores is not None]
    table = new_table(
        "task", "questions", *(f"{label}{kind}" for label, _ in shown for kind in _METRICS)
    )
    for task, score in zero_shot.model.tasks.items():
        cells = [
            _share(getattr(scores.tasks[task], kind), getattr(scores.tasks[task], error))
            for _, scores in shown
            for kind, error in _METRICS.items()
        ]
        add_row(table, task, str(score.items), *cells)
    if len(zero_shot.model.tasks) > 1:
        table.add_section()
        means = [(_share(scores.mean_acc, scores.mean_acc_stderr), "") for _, scores in shown]
        add_row(table, "mean", "", *(cell for pair in means for cell in pair), style="bold")
    place = "local files" if set(zero_shot.data.values()) != {"hub"} else "hub data"
    line = (
        f"lm-eval {zero_shot.lm_eval}, no examples, {place}, "
        f"{'all' if zero_shot.limit is None else f'first {zero_shot.limit}'} questions, "
        f"{prompt_text(zero_shot.bos)}, "
        f"{zero_shot.forward_dtype}; ± is one standard error"
    )
    return [table, Text(line, style="dim")]


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} - {interval[1]:.2f}"


def _share(share: float | None, error: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")
