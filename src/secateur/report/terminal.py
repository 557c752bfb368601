"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.models.inspection import Inspection
from secateur.patterns.plan import Plan
from secateur.report.documents.estimate import Estimate
from secateur.report.documents.evaluation import Evaluation, Figures, Protocol, ZeroShot
from secateur.report.documents.prune import LinearReport, Report
from secateur.report.documents.recovery import RecoveryReport
from secateur.report.documents.shrink import ShrinkReport, SizeCurve, SubBlockReport
from secateur.report.documents.training import TrainingReport
from secateur.report.format import bytes_text, linear_kind, seconds_text, width_text

# Blocks whose sparsities differ by more than this were not pruned evenly.
_UNEVEN = 0.005
_BARS = " ▁▂▃▄▅▆▇█"
# Metrics of zero-shot tasks, and their standard errors.
_METRICS = {"acc": "acc_stderr", "acc_norm": "acc_norm_stderr"}


def report_table(report: Report) -> RenderableType:
    """What a run did: the blocks, then the sums."""
    sparsities: list[float] = []
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("block", "sparsity", "held-out error", "worst linear", "its error", "time"):
        table.add_column(name, justify="left" if name == "worst linear" else "right")
    for block in report.blocks:
        zeros = sum(linear.zeros for linear in block.linears.values())
        weights = sum(linear.weights for linear in block.linears.values())
        errors = {name: linear.relative_error or 0.0 for name, linear in block.linears.items()}
        worst = max(errors, key=errors.__getitem__)
        sparsities.append(zeros / weights)
        table.add_row(
            str(block.index),
            f"{sparsities[-1]:.4f}",
            f"{block.held_out_error:.4f}",
            worst,
            f"{errors[worst]:.4f}",
            f"{sum(block.seconds.values()):.1f} s",
        )
    notes = [f"block {block.index}: {note}" for block in report.blocks for note in block.notes]
    stages = " + ".join(str(stage["method"]) for stage in report.recipe["stages"])
    counted = report.sparsity
    summary = Table(box=None, show_header=False, pad_edge=False)
    summary.add_row("recipe", f"{stages}, pattern {report.recipe['pattern']}")
    allocation = report.recipe["allocation"]["method"]
    if allocation != "uniform":
        summary.add_row(
            "allocation",
            f"{allocation}, blocks from {min(sparsities):.4f} to {max(sparsities):.4f}",
        )
    rounded = f", {counted.rounded_to_zero:,} by rounding" if counted.rounded_to_zero else ""
    summary.add_row(
        "sparsity",
        f"{counted.counted:.6f} counted ({counted.zeros:,} of {counted.weights:,}{rounded})",
    )
    summary.add_row(
        "time", f"{seconds_text(report.seconds['total'])} on {report.machine.cores} cores"
    )
    summary.add_row("peak memory", _memory_text(report))
    parts: list[RenderableType] = [table, Text(), summary, Text()]
    if max(sparsities) - min(sparsities) > _UNEVEN or _rows_differ(report):
        parts[2:2] = [_rates_table(report), Text()]
    if notes:
        shown = notes[:8] + ([f"{len(notes) - 8} more in report.json"] if len(notes) > 8 else [])
        parts += [Text(f"· {note}", style="dim") for note in shown]
    return Group(*parts)


def _memory_text(report: Report | TrainingReport | RecoveryReport) -> str:
    text = bytes_text(report.peak_memory_bytes)
    if report.peak_device_memory_bytes is not None:
        text += f", {bytes_text(report.peak_device_memory_bytes)} on {report.machine.device}"
    return text


def _rows_differ(report: Report) -> bool:
    """Whether rows of one linear lie in classes that are not next to each other."""
    return any(
        sum(count > 0 for count in linear.rows) > 2
        for block in report.blocks
        for linear in block.linears.values()
    )


def _rates_table(report: Report) -> RenderableType:
    """Where the zeros went: for each kind of linear, over all blocks."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("linear")
    for name in ("mean sparsity", "lowest", "highest"):
        table.add_column(name, justify="right")
    table.add_column("rows from 0 to 100 %")
    kinds: dict[str, list[LinearReport]] = {}
    for block in report.blocks:
        for name, linear in block.linears.items():
            kinds.setdefault(linear_kind(name), []).append(linear)
    for kind, linears in kinds.items():
        sparsities = [linear.sparsity for linear in linears]
        mean = sum(linear.zeros for linear in linears) / sum(linear.weights for linear in linears)
        rows = [sum(counts) for counts in zip(*(linear.rows for linear in linears), strict=True)]
        table.add_row(
            kind, f"{mean:.3f}", f"{min(sparsities):.3f}", f"{max(sparsities):.3f}", _bars(rows)
        )
    return table


def _bars(counts: Sequence[int]) -> str:
    """A histogram in one line."""
    highest = max(*counts, 1)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // highest)] for count in counts)


def shrink_table(report: ShrinkReport) -> RenderableType:
    """What is left of each block, groups × query heads and channels, then the sums."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("block", "attention groups", "feed-forward channels"):
        table.add_column(name, justify="right")
    blocks: dict[int, dict[str, SubBlockReport]] = {}
    for sub_block in report.sub_blocks:
        blocks.setdefault(sub_block.block, {})[sub_block.kind] = sub_block
    for index, parts in blocks.items():
        widths = [parts.get(kind) for kind in ("attention", "ffn")]
        table.add_row(str(index), *("all" if each is None else _width(each) for each in widths))
    counted = report.parameters
    summary = Table(box=None, show_header=False, pad_edge=False)
    summary.add_row(
        "blocks",
        f"{counted.blocks_after:,} of {counted.blocks_before:,} parameters left, "
        f"{counted.removed:.4%} removed",
    )
    summary.add_row("in files", f"{counted.model_after:,} of {counted.model_before:,} parameters")
    if report.latency is not None:
        before, expected = report.latency.before, report.latency.expected
        summary.add_row(
            "expected speed",
            f"{1e3 * before:.1f} to {1e3 * expected:.1f} ms for {report.latency.tokens} tokens "
            "through the blocks",
        )
    summary.add_row("forward passes", f"{report.forward_tokens:,} tokens")
    summary.add_row(
        "time", f"{seconds_text(report.seconds['total'])} on {report.machine.cores} cores"
    )
    return Group(table, Text(), summary, Text())


def _width(sub_block: SubBlockReport) -> str:
    dense = sub_block.queries_of
    left = width_text(sub_block.kept, sub_block.queries, dense)
    return f"{left} of {width_text(sub_block.of, dense, dense)}"


def curve_table(curve: SizeCurve) -> RenderableType:
    """Sizes and what each is expected to cost."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("removed", "parameters left in blocks", "expected KL, nats", "sub-blocks gone"):
        table.add_column(name, justify="right")
    for point in curve.points:
        gone = sum(width == 0 for width in point.widths.values())
        table.add_row(
            f"{point.removed:.1%}", f"{point.blocks_after:,}", f"{point.divergence:.4f}", str(gone)
        )
    return Group(table, Text())


def training_table(report: TrainingReport) -> RenderableType:
    """What training did: the curve, then the sums."""
    curve = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("step", "text, nats", "KL, nats", "flips", "held out, nats"):
        curve.add_column(name, justify="right")
    for validation in report.validations:
        step = int(validation["step"])
        near = [entry for entry in report.curve if entry["step"] <= step][-1:]
        flips = [entry["flip_rate"] for entry in near if "flip_rate" in entry]
        curve.add_row(
            str(step),
            *(f"{entry['cross_entropy']:.3f}" for entry in near),
            *(f"{entry['divergence']:.3f}" for entry in near),
            *([] if near else ["", ""]),
            f"{flips[0]:.2%}" if flips else "",
            f"{validation['validation_loss']:.4f}",
        )
    summary = Table(box=None, show_header=False, pad_edge=False)
    if report.start is not None:
        stages = " + ".join(str(stage["method"]) for stage in report.start.recipe["stages"])
        spent = seconds_text(report.start.seconds["total"])
        summary.add_row("start", f"{stages}, {spent}")
    held_out, counted = report.validation, report.sparsity
    dense = "" if held_out.dense is None else f", dense {held_out.dense:.4f}"
    summary.add_row("held-out loss", f"{held_out.before:.4f} to {held_out.after:.4f}{dense}")
    summary.add_row(
        "sparsity", f"{counted.counted:.6f} counted ({counted.zeros:,} of {counted.weights:,})"
    )
    if report.low_rank is not None:
        summary.add_row(
            "low rank",
            f"{report.low_rank.parameters:,} dense parameters more ({report.low_rank.share:.1%})",
        )
    summary.add_row("tokens", f"{report.tokens:,} in {report.steps:,} steps")
    _add_cached(summary, report.text)
    summary.add_row(
        "time", f"{seconds_text(report.seconds['total'])} on {report.machine.cores} cores"
    )
    summary.add_row("peak memory", _memory_text(report))
    return Group(curve, Text(), summary)


def recovery_table(report: RecoveryReport) -> RenderableType:
    """What recovery did: held-out loss from step to step, then the sums."""
    held_out, network = report.validation, report.network
    curve = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("after", "held out, nats"):
        curve.add_column(name, justify="right")
    curve.add_row("cut", f"{held_out.before:.4f}")
    if held_out.after_blocks is not None:
        curve.add_row("blocks", f"{held_out.after_blocks:.4f}")
    if network is not None:
        for each in network.validations[1:]:
            curve.add_row(f"step {int(each['step'])}", f"{each['validation_loss']:.4f}")
    summary = Table(box=None, show_header=False, pad_edge=False)
    summary.add_row(
        "held-out loss",
        f"{held_out.before:.4f} to {held_out.after:.4f}, dense {held_out.dense:.4f}",
    )
    if report.blocks:
        before, after = (
            sum(errors) / len(report.blocks)
            for errors in zip(*((each.before, each.after) for each in report.blocks), strict=True)
        )
        summary.add_row("error of blocks", f"{before:.4f} to {after:.4f}, mean")
    _add_cached(summary, report.text)
    if network is not None:
        summary.add_row("tokens", f"{network.tokens:,} in {network.steps:,} steps")
        summary.add_row("chosen", f"step {network.chosen_step}")
    if network is not None and network.adapters is not None:
        adapters = network.adapters
        summary.add_row("adapters", f"rank {adapters.rank}, {adapters.parameters:,} parameters")
    summary.add_row(
        "time", f"{seconds_text(report.seconds['total'])} on {report.machine.cores} cores"
    )
    summary.add_row("peak memory", _memory_text(report))
    return Group(curve, Text(), summary)


def _add_cached(summary: Table, text: dict[str, Any]) -> None:
    """Say so if texts were not tokenised anew."""
    parts = text.get("parts", [])
    if taken := sum(part.get("cache") == "taken" for part in parts):
        summary.add_row("text", f"tokens of {taken} of {len(parts)} sources from the cache")


def plan_table(plan: Plan) -> RenderableType:
    """Sparsity of every linear, then all together."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("linear")
    for name in ("weights", "zeros", "sparsity"):
        table.add_column(name, justify="right")
    for name, weights in plan.weights.items():
        zeros = plan.zeros[name]
        table.add_row(name, f"{weights:,}", f"{zeros:,}", f"{zeros / weights:.4f}")
    table.add_section()
    weights, zeros = sum(plan.weights.values()), sum(plan.zeros.values())
    table.add_row("all", f"{weights:,}", f"{zeros:,}", f"{plan.sparsity:.6f}", style="bold")
    return table


def inspection_table(inspection: Inspection) -> RenderableType:
    """Zeros of every linear, then the sum."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("linear")
    for name in ("shape", "zeros", "sparsity"):
        table.add_column(name, justify="right")
    table.add_column("patterns")
    for linear in inspection.linears:
        table.add_row(
            linear.name,
            " x ".join(map(str, linear.shape)),
            f"{linear.zeros:,}",
            f"{linear.sparsity:.4f}",
            ", ".join(linear.patterns),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{inspection.zeros:,}",
        f"{inspection.sparsity:.6f}",
        ", ".join(inspection.patterns),
        style="bold",
    )
    return table


def estimate_table(estimate: Estimate) -> RenderableType:
    """What a run would need."""
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "model": f"{estimate.blocks} blocks, {estimate.weights:,} weights in their linears",
        "zeros": f"{estimate.zeros:,} ({estimate.zeros / estimate.weights:.4f})",
        "peak memory": f"about {bytes_text(estimate.peak_memory_bytes)}",
        "hidden states": f"{bytes_text(estimate.activation_bytes)} ({estimate.activations_in})",
        "work": f"{estimate.forward_flops / 1e12:,.1f} TFLOP forward passes, "
        f"{estimate.statistics_flops / 1e12:,.1f} TFLOP statistics",
        "disk": f"{bytes_text(estimate.output_bytes)} for the result",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Perplexities and accuracies with their protocol, dense beside pruned."""
    parts: list[RenderableType] = []
    if evaluation.model is not None and evaluation.protocol is not None:
        parts += _perplexity_lines(evaluation, evaluation.model, evaluation.protocol)
    if parts and evaluation.zero_shot is not None:
        parts.append(Text())
    if evaluation.zero_shot is not None:
        parts += _task_lines(evaluation.zero_shot)
    return Group(*parts, *(Text(f"· {note}", style="dim") for note in evaluation.notes))


def _perplexity_lines(
    evaluation: Evaluation, model: Figures, protocol: Protocol
) -> list[RenderableType]:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("")
    for name in ("perplexity", "95 % interval", "per word", "KL from dense", "top-1 agreement"):
        table.add_column(name, justify="right")
    for label, figures in (("dense", evaluation.dense), ("model", model)):
        if figures is None:
            continue
        distance = evaluation.divergence if label == "model" else None
        table.add_row(
            label,
            f"{figures.perplexity:.2f}",
            _interval_text(figures.interval),
            "" if figures.word_perplexity is None else f"{figures.word_perplexity:.2f}",
            f"{distance.kl:.4f} nats" if distance else "",
            f"{100 * distance.top1_agreement:.1f} %" if distance else "",
        )
    if (paired := evaluation.difference) is not None:
        interval = _interval_text(paired.perplexity_interval)
        table.add_row("dense - model", f"{paired.perplexity:.2f}", interval)
    line = (
        f"{protocol.text}, {protocol.windows} windows of {protocol.window} tokens, no overlap, "
        f"{protocol.forward_dtype} on {protocol.device}; weights {model.weights_dtype}"
    )
    return [table, Text(line, style="dim")]


def _task_lines(zero_shot: ZeroShot) -> list[RenderableType]:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("task")
    models = [("dense ", zero_shot.dense), ("", zero_shot.model)]
    shown = [(label, scores) for label, scores in models if scores is not None]
    for name in ("questions", *(f"{label}{kind}" for label, _ in shown for kind in _METRICS)):
        table.add_column(name, justify="right")
    for task, score in zero_shot.model.tasks.items():
        cells = [
            _share_text(getattr(scores.tasks[task], kind), getattr(scores.tasks[task], error))
            for _, scores in shown
            for kind, error in _METRICS.items()
        ]
        table.add_row(task, str(score.items), *cells)
    if len(zero_shot.model.tasks) > 1:
        table.add_section()
        means = [(_share_text(scores.mean_acc, scores.mean_acc_stderr), "") for _, scores in shown]
        table.add_row("mean", "", *(cell for pair in means for cell in pair), style="bold")
    place = "local files" if set(zero_shot.data.values()) != {"hub"} else "hub data"
    line = (
        f"lm-eval {zero_shot.lm_eval}, no examples, {place}, "
        f"{'all' if zero_shot.limit is None else f'first {zero_shot.limit}'} questions, "
        f"{zero_shot.forward_dtype}; ± is one standard error"
    )
    return [table, Text(line, style="dim")]


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} - {interval[1]:.2f}"


def _share_text(share: float | None, error: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")
