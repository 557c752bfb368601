"""Flags that several commands share, and the recipe they make."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.recipe import Recipe


class Dtype(StrEnum):
    """Dtypes of forward passes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or .gguf file.")]
Method = Annotated[
    str | None,
    typer.Option(help="What chooses the mask, or auto; `secateur ls methods`. (default: wanda)"),
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


def recipe_from_flags(
    file: Path | None,
    *,
    method: str | None = None,
    refit: bool | None = None,
    reconstruct: bool | None = None,
    sparsity: float | None,
    pattern: str | None,
    allocate: str | None = None,
    plan: Path | None = None,
    calibration: Mapping[str, Any],
    **others: Any,
) -> Recipe:
    """Return the recipe of the file, or the default one, with the given flags put over it.

    A flag that is None leaves its value alone.

    Raises:
        SecateurError: flags that exclude each other, or an invalid value.
    """
    from secateur.planning import Plan
    from secateur.recipe import Recipe

    if plan is not None and allocate is not None:
        raise SecateurError("Give either --plan or --allocate, not both.")
    if sparsity is not None and pattern is not None:
        raise SecateurError("Give either --sparsity or --pattern, not both.")
    values = Recipe.from_file(file).model_dump(mode="json") if file else {}
    if sparsity is not None or pattern is not None:
        values["pattern"] = pattern if sparsity is None else str(sparsity)
    if method == "auto":
        if refit is not None or reconstruct is not None:
            raise SecateurError(
                "--method auto chooses its own stages; leave out --refit and --reconstruct."
            )
        values["stages"] = "auto"
    elif method is not None or refit is not None or reconstruct is not None:
        stages = [{"method": method}] if method else values.get("stages", _default_stages())
        for name, wanted in (("refit", refit), ("reconstruct", reconstruct)):
            present = any(stage["method"] == name for stage in stages)
            if wanted and not present:
                stages = [*stages, {"method": name}]
            elif wanted is False:
                stages = [stage for stage in stages if stage["method"] != name]
        values["stages"] = stages
    if allocate is not None:
        values["allocation"] = {"method": allocate}
    if plan is not None:
        values["allocation"] = {"method": "plan", "file": str(plan)}
        if sparsity is None and pattern is None:
            values["pattern"] = str(Plan.from_file(plan).pattern)
    values["calibration"] = {**values.get("calibration", {}), **given(calibration)}
    return Recipe.from_mapping({**values, **given(others)})


def _default_stages() -> list[dict[str, Any]]:
    from secateur.recipe import Recipe

    stages: list[dict[str, Any]] = Recipe().model_dump(mode="json")["stages"]
    return stages


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that have a value; one that is None leaves a default alone."""
    return {name: value for name, value in flags.items() if value is not None}
