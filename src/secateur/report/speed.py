"""What is expected to run faster, and where; plain where the answer is: nowhere."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.patterns.pattern import NM, Unstructured, parse_pattern
from secateur.report.content import Table
from secateur.report.description import pattern_of
from secateur.report.facts import Facts
from secateur.report.format import percent_text
from secateur.report.runs import Run
from secateur.runs.errors import SecateurError

_Row = tuple[str, str, str]

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
_LOW_RANK = (
    "Everywhere",
    "slower by the low-rank products",
    "They are dense and come on top of the sparse linears.",
)


def speed_table(run: Run) -> Table | None:
    """Where the result of a run should be faster; None if there is no result to run."""
    rows = [*_shrunk(run)] if run.kind == "shrink" else [*_sparse(run)]
    if not rows:
        return None
    head = ["where", "expected", "why"]
    caption = "Nothing here was measured; do so where it will run."
    return Table("", head, rows, caption, style="words")


def simulation_table(run: Run) -> Table | None:
    """Cycles on the simulated accelerator, if somebody had them counted."""
    simulation = run.simulation
    entries = [*simulation.items("projections"), simulation.at("total")]
    formulas = [
        name for name in ("corrected", "released") if simulation.at("total", "cycles", name)
    ]
    rows = [
        (each.text("name") or "?", *(cell for name in formulas for cell in _cycles(each, name)))
        for each in entries
        if each
    ]
    if not formulas:
        return None
    head = ["", *(f"{part}, {name}" for name in formulas for part in ("dense cycles", "speed-up"))]
    width, height = (simulation.number("accelerator", side) for side in ("width", "height"))
    array = "" if not width or not height else f", {width:.0f} × {height:.0f} multipliers"
    caption = (
        f"Cycles for one token on a modelled accelerator that skips zeros{array}; not the time of "
        "a machine you own. By two formulas, which are not comparable."
    )
    return Table("", head, rows, caption)


def _sparse(run: Run) -> Sequence[_Row]:
    if run.kind not in ("prune", "train"):
        return []
    rows = [_DENSE]
    match _pattern(run):
        case NM(n=2, m=4):
            rows.append(_SPARSE_CORES)
        case NM():
            rows.append(_OTHER_PATTERN)
        case Unstructured():
            rows.append(_OPENVINO)
        case _:
            pass
    if run.report.at("low_rank"):
        rows.append(_LOW_RANK)
    return rows


def _shrunk(run: Run) -> Sequence[_Row]:
    removed = run.report.number("parameters", "removed")
    match run.report.text("options", "form"):
        case "padded":
            return [_PADDED]
        case "uniform":
            return [_with_share(_UNIFORM, removed)]
        case _:
            return [_with_share(_UNEVEN, removed), _UNEVEN_ELSEWHERE]


def _with_share(row: _Row, removed: float | None) -> _Row:
    if removed is None:
        return row
    where, expected, why = row
    return where, expected, f"{percent_text(removed, 1)} of the blocks' parameters are gone. {why}"


def _pattern(run: Run) -> NM | Unstructured | None:
    text = pattern_of(run)
    if text is None:
        return None
    try:
        return parse_pattern(text)
    except SecateurError:
        return None


def _cycles(each: Facts, formula: str) -> Sequence[str]:
    dense, speed_up = (each.number("cycles", formula, key) for key in ("dense", "speed_up"))
    return (
        "" if dense is None else f"{dense:,.0f}",
        "" if speed_up is None else f"{speed_up:.2f}",
    )
