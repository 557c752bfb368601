"""Tables of what was measured in runtimes, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from secateur.report.documents.bench import Bench
from secateur.report.documents.evaluation import Evaluation
from secateur.report.format import bytes_text, number_text
from secateur.report.parts import KeyFigure, Table
from secateur.report.run_files import Json, Run
from secateur.report.terminal import add_row, new_table

_MODELS = ("model", "runtime", "form", "file", "memory", "peak")
_FIGURES = ("work", "model", "tokens/s", "times faster", "interval", "turns")


def bench_table(bench: Bench) -> RenderableType:
    """Sizes of all models, then every figure, then how they were measured."""
    found = Json(bench.model_dump(mode="json"))
    models, figures = new_table(*_MODELS), new_table(*_FIGURES)
    for row in _model_rows(found):
        add_row(models, *row)
    last = None
    for row in _figure_rows(found):
        # What is the same as above need not be said again.
        add_row(figures, "" if row[0] == last else row[0], *row[1:])
        last = row[0]
    parts: list[RenderableType] = [models, Text(), figures, Text(_protocol(found), style="dim")]
    return Group(*parts, *(Text(f"· {note}", style="dim") for note in bench.notes))


def side_by_side(evaluation: Evaluation, bench: Bench) -> RenderableType:
    """What a result costs and what it gains, beside the dense model: the first that was measured.

    Both were evaluated, and measured in the same runtime.
    """
    dense, result = bench.models[:2]
    table = new_table("", "dense", "result", "times better", "interval")
    models, divergence = (evaluation.dense, evaluation.model), evaluation.divergence
    perplexities = [each.perplexity for each in models if each is not None]
    add_row(table, "perplexity", *(f"{each:.2f}" for each in perplexities))
    if divergence is not None:
        add_row(table, "KL from dense, nats", "0", f"{divergence.kl:.4f}")
        add_row(table, "top-1 agreement", "100 %", f"{100 * divergence.top1_agreement:.1f} %")
    sizes = (
        ("file", dense.file_bytes, result.file_bytes),
        ("memory, loaded", dense.memory.loaded, result.memory.loaded),
        ("memory at the peak", dense.memory.peak, result.memory.peak),
    )
    for name, before, after in sizes:
        add_row(table, name, bytes_text(before), bytes_text(after), f"{before / after:.2f}")
    for before_, after_ in zip(dense.figures, result.figures, strict=True):
        rates = (before_.tokens_per_second, after_.tokens_per_second)
        if after_.ratio is not None and None not in rates:
            low, high = after_.ratio.interval
            add_row(
                table,
                f"{after_.work} {after_.batch} × {after_.tokens}, tokens/s",
                *(f"{rate:,.1f}" for rate in rates),
                f"{after_.ratio.median:.2f}",
                f"{low:.2f} – {high:.2f}",
            )
    found = Json(bench.model_dump(mode="json"))
    lines = [_protocol(found), *bench.notes]
    if (protocol := evaluation.protocol) is not None:
        windows = f"{protocol.windows} windows of {protocol.window} tokens"
        lines.insert(0, f"perplexity and KL on {protocol.text}, {windows}")
    return Group(table, *(Text(f"· {line}", style="dim") for line in lines))


def measured_tables(run: Run) -> list[Table]:
    """What was measured of a run, and how, for its page."""
    tables = []
    for found in run.benches:
        if rows := list(_figure_rows(found)):
            sizes = list(_model_rows(found))
            tables.append(Table("Measured", _FIGURES, rows, f"{_protocol(found)}."))
            tables.append(Table("Size", _MODELS, sizes, " ".join(found.texts("notes"))))
    return tables


def measured_figures(run: Run) -> Iterator[KeyFigure]:
    """How much faster the result of a run writes and reads, one sequence at a time."""
    for found in run.benches:
        for model in found.items("models"):
            for figure in model.items("figures"):
                ratio, batch = figure.number("ratio", "median"), figure.number("batch")
                if ratio is None or batch != 1 or figure.text("work") == "load":
                    continue
                rate = figure.number("tokens_per_second")
                spread = _interval(figure)
                yield KeyFigure(
                    f"{figure.text('work')}, times faster",
                    f"{ratio:.2f}",
                    f"{spread}; {number_text(rate, '{:,.1f}')} tokens/s",
                    f"{model.text('runtime') or '?'}, {model.text('form') or '?'}, "
                    f"{number_text(found.number('protocol', 'threads'), '{:.0f}')} threads, "
                    f"against {figure.text('ratio', 'base') or '?'}",
                )


def _model_rows(found: Json) -> Iterator[tuple[str, ...]]:
    for model in found.items("models"):
        sizes = (
            model.number("file_bytes"),
            model.number("memory", "loaded"),
            model.number("memory", "peak"),
        )
        yield (
            model.text("label") or "?",
            model.text("runtime") or "?",
            model.text("form") or "?",
            *("" if each is None else bytes_text(each) for each in sizes),
        )


def _figure_rows(found: Json) -> Iterator[tuple[str, ...]]:
    """All models of one kind of work behind each other."""
    models = found.items("models")
    for place, _ in enumerate(models[0].items("figures") if models else []):
        for model in models:
            figure = model.at("figures", place)
            rate, seconds = figure.number("tokens_per_second"), figure.number("seconds")
            speed = number_text(seconds, "{:.2f} s") if rate is None else f"{rate:,.1f}"
            yield (
                _work(figure),
                model.text("label") or "?",
                speed,
                number_text(figure.number("ratio", "median"), "{:.3f}"),
                _interval(figure),
                str(len(figure.items("repetitions"))),
            )


def _work(figure: Json) -> str:
    batch, tokens = (number_text(figure.number(key), "{:.0f}") for key in ("batch", "tokens"))
    work = figure.text("work") or "?"
    return work if work == "load" else f"{work} {batch} × {tokens}"


def _interval(figure: Json) -> str:
    low, high = figure.number("ratio", "interval", 0), figure.number("ratio", "interval", 1)
    return "" if low is None or high is None else f"{low:.3f} – {high:.3f}"


def _protocol(found: Json) -> str:
    """How figures were made, in the order in which a reader asks."""
    protocol, versions = found.at("protocol"), dict.fromkeys(_versions(found.items("models")))
    clocks = dict.fromkeys(
        figure.text("clock") or "?"
        for model in found.items("models")
        for figure in model.items("figures")
    )
    prompt, threads = (number_text(protocol.number(key)) for key in ("prompt", "threads"))
    return (
        f"medians of {' and '.join(clocks)} time, models in turn, each in a process of its own; "
        f"decode behind {prompt} tokens; threads {threads}; {', '.join(versions)}; "
        f"{found.text('machine', 'processor') or 'unknown machine'}"
    )


def _versions(models: Sequence[Json]) -> Iterator[str]:
    for model in models:
        runtime, version = model.text("runtime") or "?", model.text("version") or "?"
        device = model.text("device") or "?"
        yield f"{runtime} {version}" if runtime not in version else version
        if device != "cpu":
            yield device
