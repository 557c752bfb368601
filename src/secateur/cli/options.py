"""Flags that make a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.recipe import Recipe


class Dtype(StrEnum):
    """Dtypes of forward passes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def recipe_from_flags(
    file: Path | None,
    *,
    method: str | None,
    refit: bool | None,
    sparsity: float | None,
    pattern: str | None,
    calibration: Mapping[str, Any],
    **others: Any,
) -> Recipe:
    """Return the recipe of the file, or the default one, with the given flags put over it.

    A flag that is None leaves its value alone.

    Raises:
        SecateurError: flags that exclude each other, or an invalid value.
    """
    from secateur.recipe import Recipe

    if sparsity is not None and pattern is not None:
        raise SecateurError("Give either --sparsity or --pattern, not both.")
    values = Recipe.from_file(file).model_dump(mode="json") if file else {}
    if sparsity is not None or pattern is not None:
        values["pattern"] = pattern if sparsity is None else str(sparsity)
    if method is not None or refit is not None:
        stages: list[dict[str, Any]] = [{"method": method or "wanda"}]
        values["stages"] = stages + ([{"method": "refit"}] if refit else [])
    values["calibration"] = {**values.get("calibration", {}), **_given(calibration)}
    return Recipe.from_mapping({**values, **_given(others)})


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}
