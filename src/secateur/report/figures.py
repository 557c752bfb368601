"""The plots of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

from markupsafe import Markup

from secateur.report.content import Panel, Plots
from secateur.report.facts import Facts
from secateur.report.format import linear_kind, percent_text
from secateur.report.plot import Axis, Point, Series, count_axis, draw, fit_axis
from secateur.report.runs import Run

_WIDE, _NARROW = (720, 260), (320, 230)
_HALF, _SMALL = (320, 210), (160, 112)
# Longer lines than this are thinned: no screen shows more.
_MOST_POINTS = 240
_SPARSITY_SPAN = 0.1
_SHARE = (0.0, 1.0)

# From a run to lines by name, each a value for every block.
_ByName = dict[str, list[Point]]


def sparsity_plots(runs: Sequence[Run]) -> list[Plots]:
    """Zeros of every linear across depth."""
    found = [_linears(run, _sparsity) for run in runs]
    every = [y for lines in found for line in lines.values() for y in _heights(line)]
    if not every:
        return []
    low, high = min(every), max(every)
    caption = "Share of zeros in each linear, by block, on one scale."
    if high - low < 5e-4:
        caption += f" All linears are alike: {percent_text(high, 2)}."
    else:
        caption += f" From {percent_text(low, 2)} to {percent_text(high, 2)}."
    y = fit_axis("", every, least=_SPARSITY_SPAN, within=_SHARE, percent=True, ticks=3)
    return [_small("Sparsity of every linear", runs, found, y, caption)]


def error_plots(runs: Sequence[Run]) -> list[Plots]:
    """What blocks, and linears, lost on held-out tokens."""
    plots = []
    blocks = [
        [(_index(block, at), block.number("held_out_error")) for at, block in _blocks(run)]
        for run in runs
    ]
    if any(_heights(line) for line in blocks):
        y = fit_axis("error of the block's output", _all(blocks), zero=True)
        x = count_axis("block", _last(blocks))
        series = _named(runs, blocks)
        plots.append(
            Plots(
                "Error of every block",
                "full",
                [_full("Held-out error of every block across depth", series, x, y)],
                "Error of the block's hidden states against the dense block's on the same held-out "
                "input, that of the model pruned so far; direction counts more than length. So it "
                "says what this block lost, not what all before it lost."
                + _other_text(runs, "the errors rest on different texts"),
                _legend(runs, series),
            )
        )
    found = [_linears(run, _relative_error) for run in runs]
    every = [y for lines in found for line in lines.values() for y in _heights(line)]
    if every:
        caption = (
            "‖x(w − ŵ)ᵀ‖² / ‖xwᵀ‖² on held-out tokens, by block, on one scale: 0 is perfect, 1 as "
            "bad as removing the linear."
        )
        y = fit_axis("", every, zero=True, ticks=3)
        plots.append(_small("Error of every linear", runs, found, y, caption))
    return plots


def recovery_plots(runs: Sequence[Run]) -> list[Plots]:
    """What fitting did to each block of a recovered model."""
    recovered = [run.kind == "recover" for run in runs]
    before, after = (
        [
            [(_index(block, at), block.number(when)) for at, block in _blocks(run)] if fits else []
            for run, fits in zip(runs, recovered, strict=True)
        ]
        for when in ("before", "after")
    )
    every = [*_all(before), *_all(after)]
    if not every:
        return []
    series = [
        Series(f"{run.label}, before", line, shade, "faint")
        for shade, (run, line) in enumerate(zip(runs, before, strict=True))
    ]
    series += _named(runs, after)
    y = fit_axis("distance from the dense model", every, zero=True)
    return [
        Plots(
            "Blocks, fitted",
            "full",
            [
                _full(
                    "Distance of every block's output from the dense model's",
                    series,
                    count_axis("block", _last([*before, *after])),
                    y,
                )
            ],
            "Squared distance of hidden states from those of the dense model over the larger of "
            "both squares, on held-out tokens behind the blocks already fitted. Thin: with the "
            "weights that the block came with.",
            _legend(runs, series),
        )
    ]


def width_plots(runs: Sequence[Run]) -> list[Plots]:
    """What is left of attention and feed-forward across depth."""

    def kept(sub_block: Facts) -> float | None:
        units = _ratio(sub_block.number("kept"), sub_block.number("of"))
        queries = _ratio(sub_block.number("queries"), sub_block.number("queries_of"))
        return units if units is None or queries is None else units * queries

    found = [_sub_blocks(run, kept) for run in runs]
    caption = (
        "Share of the query heads of attention, and of the channels of the feed-forward, that stay."
    )
    y = Axis("", 0.0, 1.0, [0, 0.25, 0.5, 0.75, 1], percent=True)
    return _halves("Widths kept", runs, found, y, caption)


def cut_plots(runs: Sequence[Run]) -> list[Plots]:
    """What narrower sub-blocks are expected to cost, and what they lost."""
    penalties = [_sub_blocks(run, lambda each: each.number("penalty")) for run in runs]
    y = fit_axis("nats per token", _all(_flat(penalties)), zero=True)
    caption = (
        "Divergence from the dense model that the chosen width is expected to cause, nats per "
        "token; a fit to sub-models that were tried."
    )
    plots = _halves("Expected cost of every width", runs, penalties, y, caption)
    errors = [_sub_blocks(run, lambda each: each.number("held_out_error")) for run in runs]
    without = [_sub_blocks(run, lambda each: each.number("error_without_refit")) for run in runs]
    # Columns that were not refitted may be far worse, and of several runs there would be too many.
    behind = without if len(runs) == 1 else []
    y = fit_axis("", _all(_flat([*errors, *behind])), zero=True)
    caption = (
        "Squared change of the sub-block's output over its squared output, on held-out tokens "
        "behind the blocks already cut."
    )
    if behind:
        caption += " Thin: what it would be without the refit."
    return plots + _halves("Error of every sub-block", runs, errors, y, caption, behind)


def size_plots(runs: Sequence[Run]) -> list[Plots]:
    """Size against loss: curves, and the shrunk models on them."""
    lines: list[Series] = []
    loose: list[Series] = []
    for shade, run in enumerate(runs):
        points = _points(run.report.items("points"), "removed", "divergence")
        if points:
            lines.append(Series(run.label, [(0.0, 0.0), *points], shade))
        tried = _points(run.report.items("sub_models"), "removed", "divergence")
        loose.append(Series("sub-model", tried, shade, "loose"))
        removed = run.report.number("parameters", "removed")
        expected = run.report.number("survey", "predicted_divergence")
        if removed is not None and expected is not None:
            lines.append(Series(run.label, [(removed, expected)], shade))
    plots = []
    # A point without a curve says no more than the table does.
    if any(len(line.points) > 1 for line in lines):
        x = fit_axis(
            "parameters removed from the blocks",
            [x for line in lines for x, _ in line.points],
            zero=True,
            percent=True,
        )
        y = fit_axis(
            "KL from the dense model, nats per token",
            _all(line.points for line in lines),
            zero=True,
        )
        plots.append(
            Plots(
                "Size against expected loss",
                "full",
                [_full("Size against expected loss", [*loose, *lines], x, y)],
                "The line is what a fit expects of the best widths at each size; single points "
                "are sub-models with random widths, as they were measured.",
                _legend(runs, [*loose, *lines]),
            )
        )
    rounds = [_points(run.report.items("rounds"), "share", "loss") for run in runs]
    # Each loss is that of the model before the round.
    begun = [
        [(x, y) for (x, _), (_, y) in zip([(0.0, None), *line], line, strict=False)]
        for line in rounds
    ]
    if any(begun):
        x = fit_axis("parameters removed from the blocks", _xs(begun), zero=True, percent=True)
        y = fit_axis("loss, nats per token", _all(begun))
        series = _named(runs, begun)
        plots.append(
            Plots(
                "Loss by round",
                "full",
                [_full("Loss before every round against size", series, x, y)],
                "Loss of the model before each round, on the calibration text of that round.",
                _legend(runs, series),
            )
        )
    return plots


def training_plots(runs: Sequence[Run]) -> list[Plots]:
    """Curves of training runs."""
    steps = [_steps(run) for run in runs]
    validations = [_validations(run) for run in runs]
    losses = [_points(entries, "step", "cross_entropy") for entries in steps]
    held_out = [_points(entries, "step", "validation_loss") for entries in validations]
    every = [*_all(losses), *_all(held_out)]
    if not every:
        return []
    last = max(_xs([*losses, *held_out]))
    series = [
        Series(f"{run.label}, training text", _thinned(line), shade, "faint")
        for shade, (run, line) in enumerate(zip(runs, losses, strict=True))
    ]
    series += _named(runs, held_out)
    dense = dict.fromkeys(run.report.number("validation", "dense") for run in runs)
    levels = [Series("dense", [(0.0, loss)], kind="level") for loss in dense if loss is not None]
    y = fit_axis("loss, nats per token", [*every, *_all(line.points for line in levels)])
    x = count_axis("step", int(last))
    binned = max(len(line) for line in losses) > _MOST_POINTS
    plots = [
        Plots(
            "Loss",
            "full",
            [_full("Loss by step of training", [*series, *levels], x, y)],
            "Strong: held-out windows. Thin: the text trained on"
            + (", means of neighbouring steps" if binned else "")
            + (". Dashed: the dense model on the held-out windows." if levels else "."),
            _legend(runs, series),
        )
    ]
    names = {
        "divergence": "KL from the teacher, nats",
        "flip_rate": "mask changed",
        "learning_rate": "learning rate",
        "gradient_norm": "norm of the gradient",
    }
    panels, seen = [], list[Series]()
    for key, name in names.items():
        lines = [_thinned(_points(entries, "step", key)) for entries in steps]
        if any(_all(lines)):
            share = key == "flip_rate"
            axis = fit_axis("", _all(lines), zero=True, percent=share, ticks=3)
            below = count_axis("", int(last), ends=True)
            curves = _named(runs, lines)
            seen += curves
            panels.append(Panel(name, _drawn(name, curves, below, axis, _SMALL)))
    if panels:
        caption = "By step. Mask changed: share of the weights whose mask a choice turned over."
        plots.append(Plots("On the way", "small", panels, caption, _legend(runs, seen)))
    return plots


def _blocks(run: Run) -> Iterator[tuple[int, Facts]]:
    return enumerate(run.report.items("blocks"))


def _index(block: Facts, position: int) -> float:
    index = block.number("index")
    return float(position) if index is None or index < 0 else index


def _linears(run: Run, value: Callable[[Sequence[Facts]], float | None]) -> _ByName:
    """A value for each kind of linear in each block; the same linear of all experts is one kind."""
    lines: _ByName = {}
    for position, block in _blocks(run):
        kinds: dict[str, list[Facts]] = {}
        for name, linear in block.pairs("linears"):
            kinds.setdefault(linear_kind(name), []).append(linear)
        for kind, linears in kinds.items():
            lines.setdefault(kind, []).append((_index(block, position), value(linears)))
    return lines


def _sparsity(linears: Sequence[Facts]) -> float | None:
    zeros = [linear.number("zeros") for linear in linears]
    weights = [linear.number("weights") for linear in linears]
    return _ratio(sum(each or 0 for each in zeros), sum(each or 0 for each in weights))


def _relative_error(linears: Sequence[Facts]) -> float | None:
    errors = [linear.number("relative_error") for linear in linears]
    known = [error for error in errors if error is not None]
    return fmean(known) if known else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


_SUB_BLOCKS = {"attention": "attention", "ffn": "feed-forward"}


def _sub_blocks(run: Run, value: Callable[[Facts], float | None]) -> _ByName:
    lines: _ByName = {}
    for each in run.report.items("sub_blocks"):
        name, block = _SUB_BLOCKS.get(each.text("kind") or ""), each.number("block")
        if name and block is not None and block >= 0:
            lines.setdefault(name, []).append((block, value(each)))
    return lines


def _steps(run: Run) -> list[Facts]:
    logged = [entry for entry in run.log if entry.number("cross_entropy") is not None]
    return logged or run.report.items("curve") or run.report.items("network", "curve")


def _validations(run: Run) -> list[Facts]:
    logged = [entry for entry in run.log if entry.number("validation_loss") is not None]
    return logged or run.report.items("validations") or run.report.items("network", "validations")


def _points(entries: Iterable[Facts], x: str, y: str) -> list[Point]:
    found = [(entry.number(x), entry.number(y)) for entry in entries]
    return [(at, value) for at, value in found if at is not None and value is not None]


def _thinned(line: Sequence[Point]) -> list[Point]:
    """Means of neighbouring points, so that few enough are left."""
    stride = -(-len(line) // _MOST_POINTS) or 1
    groups = [line[begin : begin + stride] for begin in range(0, len(line), stride)]
    return [(fmean(x for x, _ in group), fmean(_heights(group))) for group in groups]


def _heights(line: Iterable[Point]) -> list[float]:
    return [y for _, y in line if y is not None]


def _all(lines: Iterable[Sequence[Point]]) -> list[float]:
    return [y for line in lines for y in _heights(line)]


def _xs(lines: Iterable[Sequence[Point]]) -> list[float]:
    return [x for line in lines for x, _ in line]


def _last(lines: Iterable[Sequence[Point]]) -> int:
    return int(max(_xs(lines), default=0))


def _flat(found: Iterable[_ByName]) -> list[list[Point]]:
    return [line for lines in found for line in lines.values()]


def _named(runs: Sequence[Run], lines: Sequence[Sequence[Point]]) -> list[Series]:
    return [
        Series(run.label, line, shade)
        for shade, (run, line) in enumerate(zip(runs, lines, strict=True))
    ]


def _legend(runs: Sequence[Run], drawn: Iterable[Series]) -> list[tuple[str, int]]:
    """The runs that have something in a plot; nobody asks if there is one run anyway."""
    seen = {each.shade for each in drawn if each.kind != "level" and _heights(each.points)}
    return [(run.label, at) for at, run in enumerate(runs) if at in seen and len(runs) > 1]


def _small(
    title: str, runs: Sequence[Run], found: Sequence[_ByName], y: Axis, caption: str
) -> Plots:
    x = count_axis("", _last(_flat(found)), ends=True)
    panels, seen = [], list[Series]()
    for name in dict.fromkeys(name for lines in found for name in lines):
        series = _named(runs, [lines.get(name, []) for lines in found])
        seen += series
        panels.append(Panel(name, _drawn(f"{title}: {name}", series, x, y, _SMALL)))
    return Plots(title, "small", panels, caption, _legend(runs, seen))


def _halves(
    title: str,
    runs: Sequence[Run],
    found: Sequence[_ByName],
    y: Axis,
    caption: str,
    behind: Sequence[_ByName] = (),
) -> list[Plots]:
    if not _all(_flat(found)):
        return []
    x = count_axis("block", _last(_flat(found)))
    panels, seen = [], list[Series]()
    for name in dict.fromkeys(name for lines in found for name in lines):
        series = [
            Series(f"{run.label}, without refit", lines.get(name, []), shade, "faint")
            for shade, (run, lines) in enumerate(zip(runs, behind, strict=False))
        ]
        series += _named(runs, [lines.get(name, []) for lines in found])
        seen += series
        panels.append(Panel(name, _drawn(f"{title}: {name}", series, x, y, _HALF)))
    return [Plots(title, "half", panels, caption, _legend(runs, seen))]


def _full(title: str, series: Sequence[Series], x: Axis, y: Axis) -> Panel:
    return Panel("", _drawn(title, series, x, y, _WIDE), _drawn(title, series, x, y, _NARROW))


def _drawn(title: str, series: Sequence[Series], x: Axis, y: Axis, size: tuple[int, int]) -> Markup:
    # The plot has escaped its texts itself.
    return Markup(draw(title, series, x, y, *size))


def _other_text(runs: Sequence[Run], consequence: str) -> str:
    """A warning where runs were calibrated on different tokens."""
    texts = {run.report.text("calibration", "sha256") for run in runs}
    return "" if len(texts) < 2 else f" These runs were calibrated differently: {consequence}."
