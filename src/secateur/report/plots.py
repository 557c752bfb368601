"""The plots of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Literal

from markupsafe import Markup

from secateur.report.format import linear_kind, percent_text
from secateur.report.parts import Panel, Plots
from secateur.report.run_files import Json, Run
from secateur.report.svg import Axis, Point, Series, count_axis, draw, fit_axis

_WIDE, _NARROW = (720, 260), (320, 230)
_SIZES = {"half": (320, 210), "small": (160, 112)}
# Longer lines than this are thinned: no screen shows more.
_MOST_POINTS = 240
_SPARSITY_SPAN = 0.1
_SUB_BLOCKS = {"attention": "attention", "ffn": "feed-forward"}
_TRAINING_CURVES = {
    "divergence": "KL from the teacher, nats",
    "flip_rate": "mask changed",
    "learning_rate": "learning rate",
    "gradient_norm": "norm of the gradient",
}

_Line = Sequence[Point]
# From a run to lines by name, each a value for every block.
_ByName = dict[str, list[Point]]


def sparsity_plots(runs: Sequence[Run]) -> list[Plots]:
    """Zeros of every linear across depth."""
    found = [_linears(run, _sparsity) for run in runs]
    every = _heights(_flat(found))
    if not every:
        return []
    low, high = min(every), max(every)
    caption = "Share of zeros in each linear, by block, on one scale."
    if high - low < 5e-4:
        caption += f" All linears are alike: {percent_text(high, 2)}."
    else:
        caption += f" From {percent_text(low, 2)} to {percent_text(high, 2)}."
    y = fit_axis("", every, least=_SPARSITY_SPAN, within=(0.0, 1.0), percent=True, ticks=3)
    return _panels("Sparsity of every linear", runs, found, y, caption, "small")


def error_plots(runs: Sequence[Run]) -> list[Plots]:
    """What blocks, and linears, lost on held-out tokens."""
    plots = []
    blocks = [_across(run, "held_out_error") for run in runs]
    if _heights(blocks):
        texts = {run.report.text("calibration", "sha256") for run in runs}
        caption = (
            "Error of the block's hidden states against the dense block's on the same held-out "
            "input, that of the model pruned so far; direction counts more than length. So it "
            "says what this block lost, not what all before it lost."
        )
        if len(texts) > 1:
            caption += (
                " These runs were calibrated differently: the errors rest on different texts."
            )
        plots.append(
            _plot(
                "Error of every block",
                "Held-out error of every block across depth",
                runs,
                _named(runs, blocks),
                count_axis("block", _last(blocks)),
                fit_axis("error of the block's output", _heights(blocks), zero=True),
                caption,
            )
        )
    found = [_linears(run, _relative_error) for run in runs]
    caption = (
        "‖x(w − ŵ)ᵀ‖² / ‖xwᵀ‖² on held-out tokens, by block, on one scale: 0 is perfect, 1 as "
        "bad as removing the linear."
    )
    y = fit_axis("", _heights(_flat(found)), zero=True, ticks=3)
    return plots + _panels("Error of every linear", runs, found, y, caption, "small")


def recovery_plots(runs: Sequence[Run]) -> list[Plots]:
    """What fitting did to each block of a recovered model."""
    before, after = (
        [_across(run, when) if run.kind == "recover" else [] for run in runs]
        for when in ("before", "after")
    )
    both = [*before, *after]
    if not _heights(both):
        return []
    return [
        _plot(
            "Blocks, fitted",
            "Distance of every block's output from the dense model's",
            runs,
            [*_named(runs, before, ", before"), *_named(runs, after)],
            count_axis("block", _last(both)),
            fit_axis("distance from the dense model", _heights(both), zero=True),
            "Squared distance of hidden states from those of the dense model over the larger of "
            "both squares, on held-out tokens behind the blocks already fitted. Thin: with the "
            "weights that the block came with.",
        )
    ]


def width_plots(runs: Sequence[Run]) -> list[Plots]:
    """What is left of attention and feed-forward across depth."""

    def kept(sub_block: Json) -> float | None:
        units = _ratio(sub_block.number("kept"), sub_block.number("of"))
        queries = _ratio(sub_block.number("queries"), sub_block.number("queries_of"))
        return units if units is None or queries is None else units * queries

    found = [_sub_blocks(run, kept) for run in runs]
    caption = (
        "Share of the query heads of attention, and of the channels of the feed-forward, that stay."
    )
    y = Axis("", 0.0, 1.0, [0, 0.25, 0.5, 0.75, 1], percent=True)
    return _panels("Widths kept", runs, found, y, caption, "half")


def cut_plots(runs: Sequence[Run]) -> list[Plots]:
    """What narrower sub-blocks are expected to cost, and what they lost."""

    def found(key: str) -> list[_ByName]:
        return [_sub_blocks(run, lambda each: each.number(key)) for run in runs]

    penalties, errors = found("penalty"), found("held_out_error")
    y = fit_axis("nats per token", _heights(_flat(penalties)), zero=True)
    caption = (
        "Divergence from the dense model that the chosen width is expected to cause, nats per "
        "token; a fit to sub-models that were tried."
    )
    plots = _panels("Expected cost of every width", runs, penalties, y, caption, "half")
    # Columns that were not refitted may be far worse, and of several runs there would be too many.
    behind = found("error_without_refit") if len(runs) == 1 else []
    y = fit_axis("", _heights(_flat([*errors, *behind])), zero=True)
    caption = (
        "Squared change of the sub-block's output over its squared output, on held-out tokens "
        "behind the blocks already cut."
    )
    if behind:
        caption += " Thin: what it would be without the refit."
    return plots + _panels("Error of every sub-block", runs, errors, y, caption, "half", behind)


def size_plots(runs: Sequence[Run]) -> list[Plots]:
    """Size against loss: curves, and the shrunk models on them."""
    lines: list[Series] = []
    loose: list[Series] = []
    for shade, run in enumerate(runs):
        if points := _points(run.report.items("points"), "removed", "divergence"):
            lines.append(Series(run.label, [(0.0, 0.0), *points], shade))
        tried = _points(run.report.items("sub_models"), "removed", "divergence")
        loose.append(Series("sub-model", tried, shade, "loose"))
        removed = run.report.number("parameters", "removed")
        expected = run.report.number("survey", "predicted_divergence")
        if removed is not None and expected is not None:
            lines.append(Series(run.label, [(removed, expected)], shade))
    plots = []
    removed_label = "parameters removed from the blocks"
    # A point without a curve says no more than the table does.
    if any(len(line.points) > 1 for line in lines):
        drawn = [line.points for line in lines]
        plots.append(
            _plot(
                "Size against expected loss",
                "Size against expected loss",
                runs,
                [*loose, *lines],
                fit_axis(removed_label, _xs(drawn), zero=True, percent=True),
                fit_axis("KL from the dense model, nats per token", _heights(drawn), zero=True),
                "The line is what a fit expects of the best widths at each size; single points "
                "are sub-models with random widths, as they were measured.",
            )
        )
    rounds = [_points(run.report.items("rounds"), "share", "loss") for run in runs]
    # Each loss is that of the model before the round.
    begun = [
        [(x, y) for (x, _), (_, y) in zip([(0.0, None), *line], line, strict=False)]
        for line in rounds
    ]
    if any(begun):
        plots.append(
            _plot(
                "Loss by round",
                "Loss before every round against size",
                runs,
                _named(runs, begun),
                fit_axis(removed_label, _xs(begun), zero=True, percent=True),
                fit_axis("loss, nats per token", _heights(begun)),
                "Loss of the model before each round, on the calibration text of that round.",
            )
        )
    return plots


def training_plots(runs: Sequence[Run]) -> list[Plots]:
    """Curves of training runs."""
    steps = [_logged(run, "cross_entropy", "curve") for run in runs]
    validations = [_logged(run, "validation_loss", "validations") for run in runs]
    losses = [_points(entries, "step", "cross_entropy") for entries in steps]
    held_out = [_points(entries, "step", "validation_loss") for entries in validations]
    both = [*losses, *held_out]
    if not _heights(both):
        return []
    last = _last(both)
    dense = dict.fromkeys(run.report.number("validation", "dense") for run in runs)
    levels = [Series("dense", [(0.0, loss)], kind="level") for loss in dense if loss is not None]
    binned = max(len(line) for line in losses) > _MOST_POINTS
    plots = [
        _plot(
            "Loss",
            "Loss by step of training",
            runs,
            [
                *_named(runs, [_thinned(line) for line in losses], ", training text"),
                *_named(runs, held_out),
                *levels,
            ],
            count_axis("step", last),
            fit_axis("loss, nats per token", _heights([*both, *(each.points for each in levels)])),
            "Strong: held-out windows. Thin: the text trained on"
            + (", means of neighbouring steps" if binned else "")
            + (". Dashed: the dense model on the held-out windows." if levels else "."),
        )
    ]
    panels, seen = [], list[Series]()
    for key, name in _TRAINING_CURVES.items():
        lines = [_thinned(_points(entries, "step", key)) for entries in steps]
        if heights := _heights(lines):
            y = fit_axis("", heights, zero=True, percent=key == "flip_rate", ticks=3)
            series = _named(runs, lines)
            seen += series
            x = count_axis("", last, ends=True)
            panels.append(Panel(name, _drawn(name, series, x, y, _SIZES["small"])))
    if panels:
        caption = "By step. Mask changed: share of the weights whose mask a choice turned over."
        plots.append(Plots("On the way", "small", panels, caption, _legend(runs, seen)))
    return plots


def _plot(
    title: str,
    described: str,
    runs: Sequence[Run],
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    caption: str,
) -> Plots:
    """One plot as wide as the page; what it shows is described to those who do not see it."""
    wide, narrow = (_drawn(described, series, x, y, size) for size in (_WIDE, _NARROW))
    return Plots(title, "full", [Panel("", wide, narrow)], caption, _legend(runs, series))


def _panels(
    title: str,
    runs: Sequence[Run],
    found: Sequence[_ByName],
    y: Axis,
    caption: str,
    size: Literal["half", "small"],
    behind: Sequence[_ByName] = (),
) -> list[Plots]:
    """A plot for each name that any run has, or nothing if there are no values at all."""
    if not _heights(_flat(found)):
        return []
    small = size == "small"
    x = count_axis("" if small else "block", _last(_flat(found)), ends=small)
    panels, seen = [], list[Series]()
    for name in dict.fromkeys(name for lines in found for name in lines):
        series = [
            *_named(
                runs[: len(behind)], [each.get(name, []) for each in behind], ", without refit"
            ),
            *_named(runs, [lines.get(name, []) for lines in found]),
        ]
        seen += series
        panels.append(Panel(name, _drawn(f"{title}: {name}", series, x, y, _SIZES[size])))
    return [Plots(title, size, panels, caption, _legend(runs, seen))]


def _drawn(title: str, series: Sequence[Series], x: Axis, y: Axis, size: tuple[int, int]) -> Markup:
    # The plot has escaped its texts itself.
    return Markup(draw(title, series, x, y, *size))


def _named(runs: Sequence[Run], lines: Sequence[_Line], faint: str = "") -> list[Series]:
    """Lines of runs, thin ones if something is said behind the name."""
    return [
        Series(run.label + faint, line, shade, "faint" if faint else "line")
        for shade, (run, line) in enumerate(zip(runs, lines, strict=True))
    ]


def _legend(runs: Sequence[Run], drawn: Iterable[Series]) -> list[tuple[str, int]]:
    """The runs that have something in a plot; nobody asks if there is one run anyway."""
    seen = {each.shade for each in drawn if each.kind != "level" and _heights([each.points])}
    return [(run.label, at) for at, run in enumerate(runs) if at in seen and len(runs) > 1]


def _index(block: Json, position: int) -> float:
    index = block.number("index")
    return float(position) if index is None or index < 0 else index


def _across(run: Run, key: str) -> list[Point]:
    """A number of every block."""
    blocks = enumerate(run.report.items("blocks"))
    return [(_index(block, at), block.number(key)) for at, block in blocks]


def _linears(run: Run, value: Callable[[Sequence[Json]], float | None]) -> _ByName:
    """A value for each kind of linear in each block; the same linear of all experts is one kind."""
    lines: _ByName = {}
    for position, block in enumerate(run.report.items("blocks")):
        kinds: dict[str, list[Json]] = {}
        for name, linear in block.pairs("linears"):
            kinds.setdefault(linear_kind(name), []).append(linear)
        for kind, linears in kinds.items():
            lines.setdefault(kind, []).append((_index(block, position), value(linears)))
    return lines


def _sparsity(linears: Sequence[Json]) -> float | None:
    zeros, weights = (
        sum(linear.number(key) or 0 for linear in linears) for key in ("zeros", "weights")
    )
    return _ratio(zeros, weights)


def _relative_error(linears: Sequence[Json]) -> float | None:
    errors = [linear.number("relative_error") for linear in linears]
    known = [error for error in errors if error is not None]
    return fmean(known) if known else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _sub_blocks(run: Run, value: Callable[[Json], float | None]) -> _ByName:
    lines: _ByName = {}
    for each in run.report.items("sub_blocks"):
        name, block = _SUB_BLOCKS.get(each.text("kind") or ""), each.number("block")
        if name and block is not None and block >= 0:
            lines.setdefault(name, []).append((block, value(each)))
    return lines


def _logged(run: Run, key: str, kept: str) -> list[Json]:
    """Entries of the log that have a key, or what the report keeps of them."""
    logged = [entry for entry in run.log if entry.number(key) is not None]
    return logged or run.report.items(kept) or run.report.items("network", kept)


def _points(entries: Iterable[Json], x: str, y: str) -> list[Point]:
    found = [(entry.number(x), entry.number(y)) for entry in entries]
    return [(at, value) for at, value in found if at is not None and value is not None]


def _thinned(line: _Line) -> list[Point]:
    """Means of neighbouring points, so that few enough are left."""
    stride = -(-len(line) // _MOST_POINTS) or 1
    groups = [line[begin : begin + stride] for begin in range(0, len(line), stride)]
    return [(fmean(x for x, _ in group), fmean(_heights([group]))) for group in groups]


def _heights(lines: Iterable[_Line]) -> list[float]:
    return [y for line in lines for _, y in line if y is not None]


def _xs(lines: Iterable[_Line]) -> list[float]:
    return [x for line in lines for x, _ in line]


def _last(lines: Iterable[_Line]) -> int:
    return int(max(_xs(lines), default=0))


def _flat(found: Iterable[_ByName]) -> list[list[Point]]:
    return [line for lines in found for line in lines.values()]
