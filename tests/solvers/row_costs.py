"""Random costs of rows, and pieces of rows so small that every loop over them runs."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solvers.margin import RowCosts


def two_rows(like_OI: Tensor) -> list[slice]:
    """Stands in for ``row_chunks``."""
    return [slice(start, start + 2) for start in range(0, len(like_OI), 2)]


def random_costs(seed: int, dtype: torch.dtype, rows: int = 5, columns: int = 40) -> RowCosts:
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(rows, columns, generator=generator, dtype=dtype)
    norm_I = torch.rand(columns, generator=generator, dtype=dtype)
    return RowCosts(w_OI, norm_I, torch.rand(rows, generator=generator, dtype=dtype))


def all_costs(costs: RowCosts) -> Tensor:
    return costs.w_OI.abs() * costs.norm_I * costs.root_O[:, None]
