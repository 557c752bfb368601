"""One page about one run or several: a file of its own that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from secateur.report import description, details, figures, measures, speed
from secateur.report.content import (
    Continuations,
    KeyFigure,
    KeyFigures,
    Lines,
    Part,
    Section,
    Table,
)
from secateur.report.plot import SHADES
from secateur.report.runs import Run, read_runs
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_text

_Titled = Continuations | Lines | Table


def write_report(
    folders: str | Path | Sequence[str | Path], output: str | Path | None = None
) -> Path:
    """Write an HTML page about finished runs, several of them side by side, and return its path.

    The page is made from the files of the runs alone: ``report.json`` or ``curve.json``, the
    training log, and what lies in ``DIR/secateur`` as ``evaluation*.json``, ``simulation.json``
    and ``continuations.json``. It has no script and asks for nothing else.

    Args:
        folders: output folder of a run, or several.
        output: the file to write; ``DIR/secateur/report.html`` if None and there is one run.

    Raises:
        SecateurError: a folder holds no finished run, or the file cannot be written.
    """
    runs, path = prepare([folders] if isinstance(folders, str | Path) else folders, output)
    try:
        write_text(path, render(runs))
    except OSError as error:
        raise SecateurError(
            f"The report {path} cannot be written ({error.strerror}); name another file with "
            "--output."
        ) from error
    return path


def prepare(folders: Sequence[str | Path], output: str | Path | None) -> tuple[list[Run], Path]:
    """Read the runs and decide where the page about them goes; arguments as above."""
    runs = read_runs(folders)
    if not runs:
        raise SecateurError("A report needs the output folder of a run; name one or more.")
    if output is not None:
        path = Path(output).expanduser()
        if path.is_dir():
            raise SecateurError(f"{path} is a folder; name the file to write with --output.")
        return runs, path
    if len(runs) > 1:
        raise SecateurError(
            "A report of several runs belongs to none of their folders; name a file with --output."
        )
    return runs, runs[0].folder / "secateur" / "report.html"


def render(runs: Sequence[Run]) -> str:
    """The page as a text; what runs say is escaped wherever it stands."""
    first = runs[0]
    models = list(dict.fromkeys(_model(run) for run in runs))
    return _template().render(
        title=models[0] if len(models) == 1 else f"{len(runs)} runs",
        subtitle=description.headline(first) if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=[section for section in _sections(runs) if section.parts],
        shades=SHADES,
        runs=len(runs),
        version=first.report.text("machine", "versions", "secateur") or "",
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("secateur.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _sections(runs: Sequence[Run]) -> list[Section]:
    def each(make: Callable[[Run], _Titled | None], title: str = "") -> list[_Titled]:
        """What each run has of a kind, under its label; runs that are alike share it."""
        alike: list[tuple[_Titled, list[str]]] = []
        for run in runs:
            part = make(run)
            labels = next((labels for other, labels in alike if other == part), None)
            if labels is not None:
                labels.append(run.label)
            elif part is not None:
                alike.append((part, [run.label]))
        return [replace(part, title=_titled(runs, labels, title)) for part, labels in alike]

    return [
        Section("At a glance", _glance(runs)),
        Section("What was done", description.done(runs)),
        Section("What it costs", measures.evaluation_tables(runs)),
        Section(
            "Where the weights went", [*figures.sparsity_plots(runs), *figures.width_plots(runs)]
        ),
        Section("What each block lost", [*figures.error_plots(runs), *figures.cut_plots(runs)]),
        Section("What each block learned", figures.recovery_plots(runs)),
        Section("Size against loss", figures.size_plots(runs)),
        Section("Training", figures.training_plots(runs)),
        Section(
            "The same texts, dense and pruned",
            each(details.continuations),
        ),
        Section(
            "What is expected to run faster",
            [
                *each(speed.speed_table),
                *each(speed.simulation_table, "Simulated accelerator"),
            ],
        ),
        Section(
            "Details",
            [
                *each(details.notes, "Notes"),
                *each(details.block_table, "Blocks"),
                *each(details.width_table, "Sub-blocks"),
                *each(details.curve_table, "Sizes"),
            ],
        ),
    ]


def _glance(runs: Sequence[Run]) -> list[Part]:
    """The key figures of one run, or a table of those of several."""
    found = [measures.key_figures(run) for run in runs]
    if len(runs) == 1:
        return [KeyFigures(found[0])] if found[0] else []
    values = [{_comparable(each): _with_dense(each) for each in entries} for entries in found]
    rows = [("what was done", *map(description.headline, runs))]
    labels = sorted(
        dict.fromkeys(label for each in values for label in each), key=measures.COSTS.__contains__
    )
    rows += [(label, *(each.get(label, "") for each in values)) for label in labels]
    return [Table("", ["", *(run.label for run in runs)], rows, style="compared")]


def _comparable(figure: KeyFigure) -> str:
    return f"{figure.label}, {figure.protocol}" if figure.protocol else figure.label


def _with_dense(figure: KeyFigure) -> str:
    """No figure without that of the dense model, where there is one."""
    return f"{figure.value} ({figure.beside})" if "dense" in figure.beside else figure.value


def _titled(runs: Sequence[Run], labels: Sequence[str], title: str) -> str:
    if len(runs) == 1:
        return title
    return ": ".join(filter(None, [title, ", ".join(labels)]))


def _model(run: Run) -> str:
    """The model's name, without the folders it lay in."""
    name = run.report.text("model") or run.label
    return Path(name).name or name if name.startswith(("/", "~", ".")) else name
