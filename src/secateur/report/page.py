"""One page about one run or several: a file of its own that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from secateur.report import plots, speed, summary, tables
from secateur.report.card import write_card
from secateur.report.parts import Continuations, Lines, Part, Table
from secateur.report.run_files import Run, read_runs
from secateur.report.svg import SHADES
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_text, writing

_Titled = Continuations | Lines | Table

# The beginning of every page names it.
_GENERATOR = b'<meta name="generator" content="secateur'


def write_report(
    folders: str | Path | Sequence[str | Path], output: str | Path | None = None
) -> Path:
    """Write an HTML page about finished runs, several of them side by side, and return its path.

    The page is made from the files of the runs alone: ``report.json`` or ``curve.json``, the
    training log, and what lies in ``DIR/secateur`` as ``evaluation*.json``, ``simulation.json``
    and ``continuations.json``. It has no script and asks for nothing else. The page of one run in
    its own folder comes with its model card (``write_card``).

    Args:
        folders: output folder of a run, or several.
        output: the file to write; ``DIR/secateur/report.html`` if None and there is one run.

    Raises:
        SecateurError: a folder holds no finished run, or the file cannot be written.
    """
    runs, path = prepare([folders] if isinstance(folders, str | Path) else folders, output)
    write_text(path, render(runs))
    if output is None:
        write_card(runs[0].folder)
    return path


def prepare(folders: Sequence[str | Path], output: str | Path | None) -> tuple[list[Run], Path]:
    """Read the runs and decide where the page about them goes; arguments as above."""
    runs = read_runs(folders)
    if not runs:
        raise SecateurError("A report needs the output folder of a run; name one or more.")
    if output is not None:
        path = Path(output).expanduser()
        with writing(path):
            if path.is_dir():
                raise SecateurError(f"{path} is a folder; name the file to write with --output.")
            if path.is_symlink() or (path.exists() and not _is_page(path)):
                raise SecateurError(
                    f"{path} is there already and is no page of secateur; name another file."
                )
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
        subtitle=summary.headline(first) if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=_sections(runs),
        shades=SHADES,
        runs=len(runs),
        version=first.report.text("machine", "versions", "secateur") or "",
    )


def _is_page(path: Path) -> bool:
    """Whether a file is a page that was written here."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _GENERATOR in file.read(1 << 12)


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


def _sections(runs: Sequence[Run]) -> list[tuple[str, Sequence[Part]]]:
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
        if len(runs) == 1:
            return [replace(part, title=title) for part, _ in alike]
        return [
            replace(part, title=": ".join(filter(None, [title, ", ".join(labels)])))
            for part, labels in alike
        ]

    return [
        ("At a glance", summary.glance(runs)),
        ("What was done", summary.done(runs)),
        ("What it costs", tables.evaluation_tables(runs)),
        ("Where the weights went", [*plots.sparsity_plots(runs), *plots.width_plots(runs)]),
        ("What each block lost", [*plots.error_plots(runs), *plots.cut_plots(runs)]),
        ("What each block learned", plots.recovery_plots(runs)),
        ("Size against loss", plots.size_plots(runs)),
        ("Training", plots.training_plots(runs)),
        ("The same texts, dense and pruned", each(tables.continuations)),
        ("What runs faster", [table for run in runs for table in speed.measured_tables(run)]),
        (
            "What is expected to run faster",
            [*each(tables.speed_table), *each(tables.simulation_table, "Simulated accelerator")],
        ),
        (
            "Details",
            [
                *each(tables.notes, "Notes"),
                *each(tables.block_table, "Blocks"),
                *each(tables.width_table, "Sub-blocks"),
                *each(tables.curve_table, "Sizes"),
            ],
        ),
    ]


def _model(run: Run) -> str:
    """The model's name, without the folders it lay in."""
    name = run.report.text("model") or run.label
    return Path(name).name or name if name.startswith(("/", "~", ".")) else name
