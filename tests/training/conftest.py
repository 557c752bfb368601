"""Cut models, and what they were cut from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import shrink


@pytest.fixture(scope="session")
def cut_models(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Return a function that gives a cut model of a family in some form, and its dense one."""
    made: dict[tuple[str, str, float], Path] = {}

    def make(
        family: str = "llama", form: str = "uneven", sparsity: float = 0.4
    ) -> tuple[Path, Path]:
        dense = checkpoints(family)
        if (family, form, sparsity) not in made:
            output = tmp_path_factory.mktemp(f"{family}-{form}-") / "cut"
            options = ShrinkOptions.from_mapping(
                {
                    "sparsity": sparsity,
                    "form": form,
                    "sub_models": 12,
                    "dtype": "float32",
                    "calibration": {"source": str(text_file), "samples": 8, "length": 32},
                }
            )
            shrink(dense, output, options)
            made[family, form, sparsity] = output
        return made[family, form, sparsity], dense

    return make
