"""Flags that several commands share, and the recipe they make."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.runs.errors import SecateurError

if TYPE_CHECKING:
    from secateur.pruning.recipe import Recipe


class Dtype(StrEnum):
    """Dtypes of forward passes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Rebuild(StrEnum):
    """Stages that exchange weights of a mask."""

    BARBER = "barber"
    SWAPS = "swaps"


class QuantizedFormat(StrEnum):
    """How quantised weights are saved."""

    PACKED = "packed"
    DEQUANTIZED = "dequantized"


class Curves(StrEnum):
    """Programs that show curves of a run."""

    TENSORBOARD = "tensorboard"


class Integers(StrEnum):
    """Widths of quantised weights."""

    INT3 = "int3"
    INT4 = "int4"
    INT8 = "int8"


Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or .gguf file.")]
Method = Annotated[
    str | None,
    typer.Option(help="What chooses the mask, or auto; `secateur ls methods`. (default: wanda)"),
]
RebuildMasks = Annotated[
    Rebuild | None,
    typer.Option("--rebuild", help="Exchange badly chosen weights of the mask. (default: no)"),
]
Refit = Annotated[
    bool | None,
    typer.Option("--refit/--no-refit", help="Fit kept weights anew. (default: with wanda)"),
]
Reconstruct = Annotated[
    bool | None,
    typer.Option(
        "--reconstruct/--no-reconstruct",
        help="Train kept weights on the output of their block. (default: no)",
    ),
]
Quantize = Annotated[
    Integers | None,
    typer.Option(
        "--quantize", help="Make the kept weights integers of so many bits. (default: no)"
    ),
]
QuantizeGroup = Annotated[
    int | None,
    typer.Option(help="Columns that share a scale, 0 for one scale per row. (default: 128)"),
]
Asymmetric = Annotated[
    bool | None,
    typer.Option("--asymmetric/--symmetric", help="Zero points of their own. (default: symmetric)"),
]
Format = Annotated[
    QuantizedFormat | None,
    typer.Option(
        "--quantized-format",
        help="packed, for compressed-tensors, or dequantized, in the model's dtype. "
        "(default: packed)",
    ),
]
TrainScales = Annotated[
    bool | None,
    typer.Option(
        "--train-scales/--no-train-scales",
        help="Train the scales of quantized weights on the output of their block. (default: no)",
    ),
]
Permute = Annotated[
    bool | None,
    typer.Option(
        "--permute/--no-permute",
        help="Order hidden channels so that n:m prunes less of them. (default: no)",
    ),
]
Sparsity = Annotated[float | None, typer.Option(help="Share of weights to remove. (default: 0.5)")]
PatternText = Annotated[
    str | None, typer.Option(help="n:m, keep n of every m input columns, such as 2:4.")
]
Allocate = Annotated[
    str | None,
    typer.Option(
        help="Who divides the zeros among linears; `secateur ls allocations`. (default: uniform)"
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="self, FILE.txt, FILE.jsonl, or a hub name. (default: self)"),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows. (default: 128)")]
Length = Annotated[int | None, typer.Option(help="Tokens per window. (default: 512)")]
Seed = Annotated[int | None, typer.Option(help="Seed of all random choices. (default: 0)")]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Begin every window with the beginning-of-text token."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")]
ForwardDtype = Annotated[
    Dtype | None, typer.Option(help="Dtype of forward passes. (default: auto)")
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="YAML recipe; other flags override its values.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
]
LogTo = Annotated[
    Curves | None,
    typer.Option(help="Also write the figures of every step for this program. (default: no)"),
]
MoreOptions = Annotated[
    Path | None, typer.Option(help="YAML with more options; flags override its values.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Start over in the folder of an earlier run.")
]
ReportAsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]

# Stages at a recipe's end, once weights are integers.
_ON_THE_GRID = ("quantize", "scales")


def recipe_from_flags(
    file: Path | None,
    *,
    method: str | None = None,
    rebuild: Rebuild | None = None,
    refit: bool | None = None,
    reconstruct: bool | None = None,
    permute: bool | None = None,
    quantize: Integers | None = None,
    quantize_group: int | None = None,
    asymmetric: bool | None = None,
    quantized_format: QuantizedFormat | None = None,
    train_scales: bool | None = None,
    sparsity: float | None,
    pattern: str | None,
    allocate: str | None = None,
    plan: Path | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    bos: bool | None = None,
    **others: Any,
) -> Recipe:
    """Return the recipe of the file, or the default one, with the given flags put over it.

    A flag that is None leaves its value alone.

    Raises:
        SecateurError: flags that exclude each other, or an invalid value.
    """
    from secateur.patterns.plan import Plan
    from secateur.pruning.recipe import Recipe
    from secateur.runs.options import read_mapping

    if plan is not None and allocate is not None:
        raise SecateurError("Give either --plan or --allocate, not both.")
    if sparsity is not None and pattern is not None:
        raise SecateurError("Give either --sparsity or --pattern, not both.")
    if method == "auto" and any(flag is not None for flag in (rebuild, refit, reconstruct)):
        raise SecateurError(
            "--method auto chooses its own stages; leave out --rebuild, --refit and --reconstruct."
        )
    asked: dict[str, Any] = {}
    if sparsity is not None or pattern is not None:
        asked["pattern"] = pattern if sparsity is None else str(sparsity)
    if allocate is not None:
        asked["allocation"] = {"method": allocate}
    if plan is not None:
        asked["allocation"] = {"method": "plan", "file": str(plan)}
        if "pattern" not in asked:
            asked["pattern"] = str(Plan.from_file(plan).pattern)
    written = read_mapping(file, Recipe.noun) if file else {}
    if method is not None:
        written["stages"] = method if method == "auto" else [{"method": method}]
    # What auto stands for follows the pattern; other stages of a file may yet lose what it forbids.
    if method is not None or written.get("stages") == "auto":
        written |= asked
    values = Recipe.from_mapping(written).model_dump(mode="json") | asked
    stages = values["stages"]
    if rebuild is not None:
        stages = _rebuilt(stages, rebuild)
    for name, wanted in (("refit", refit), ("reconstruct", reconstruct)):
        present = any(stage["method"] == name for stage in stages)
        if wanted and not present:
            stages = [*stages, {"method": name}]
        elif wanted is False:
            stages = [stage for stage in stages if stage["method"] != name]
    # Sorting is stable: what comes before stays as it is.
    stages = sorted(stages, key=lambda stage: stage["method"] in _ON_THE_GRID)
    if permute is not None:
        stages = _permuted(stages, permute)
    grid = given(
        {
            "bits": None if quantize is None else int(quantize.value.removeprefix("int")),
            "group": quantize_group,
            "symmetric": None if asymmetric is None else not asymmetric,
            "format": None if quantized_format is None else quantized_format.value,
        }
    )
    if grid:
        stages = _quantized(stages, grid)
    if train_scales is not None:
        stages = [stage for stage in stages if stage["method"] != "scales"]
        stages += [{"method": "scales"}] if train_scales else []
    text = values["calibration"] | text_options(calibration, samples, length, seed, bos)
    return Recipe.from_mapping(values | {"stages": stages, "calibration": text} | given(others))


def text_options(
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    bos: bool | None,
) -> dict[str, Any]:
    """The flags of calibration text that were given, by the names of their options."""
    return given(
        {"source": calibration, "samples": samples, "length": length, "seed": seed, "bos": bos}
    )


def _quantized(stages: list[dict[str, Any]], grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages with quantize behind them, and these options in it."""
    present = [stage for stage in stages if stage["method"] == "quantize"]
    if not present and "bits" not in grid:
        raise SecateurError(
            "--quantize-group, --asymmetric and --quantized-format say how to quantise; give "
            "--quantize int4, int8 or int3 as well."
        )
    before = [stage for stage in stages if stage["method"] not in _ON_THE_GRID]
    behind = [stage for stage in stages if stage["method"] == "scales"]
    return [*before, {"method": "quantize", **(present[0] if present else {}), **grid}, *behind]


def _permuted(stages: list[dict[str, Any]], wanted: bool) -> list[dict[str, Any]]:
    """The stages with permute before them, or without it."""
    present = [stage for stage in stages if stage["method"] == "permute"]
    others = [stage for stage in stages if stage["method"] != "permute"]
    return [*(present or [{"method": "permute"}]), *others] if wanted else others


def _rebuilt(stages: list[dict[str, Any]], rebuild: Rebuild) -> list[dict[str, Any]]:
    """Put the stage behind the last one that chooses a mask, unless it is there already."""
    from secateur.methods import STAGES

    names = [stage["method"] for stage in stages]
    if rebuild.value in names:
        return stages
    choosers = [name for name, stage in STAGES.items() if stage.chooses_mask]
    behind = 1 + max((i for i, name in enumerate(names) if name in choosers), default=0)
    return [*stages[:behind], {"method": rebuild.value}, *stages[behind:]]


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that have a value; one that is None leaves a default alone."""
    return {name: value for name, value in flags.items() if value is not None}
