"""Cycles against a count weight by weight, published baselines, and what must always hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.deploy.accelerator import (
    Accelerator,
    Formula,
    Memory,
    dense_cycles,
    pruned_cycles,
)
from secateur.runs.errors import SecateurError

SMALL = Accelerator(width=4, height=2)


def cycles(mask_OI: Tensor, formula: Formula, accelerator: Accelerator = SMALL) -> int:
    return pruned_cycles(mask_OI.sum(0), len(mask_OI), formula, accelerator)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    # Columns differ, so that some are whole and some are not.
    rate_I = torch.rand(columns, generator=generator) ** draw(st.sampled_from([0.3, 1, 3]))
    return torch.rand(rows, columns, generator=generator) < rate_I


@pytest.mark.parametrize(
    ("rows", "columns", "released", "corrected"),
    [
        (4096, 4096, 4096, 4096),  # attention of LLaMA-7B, published
        (4096, 11008, 10128, 11008),  # its down projection, published
        (11008, 4096, 4096, 11008),  # gate and up
        (5120, 13824, 15936, 17280),  # down projections of 13B, 30B, 65B and of LLaMA-2-70B
        (6656, 17920, 26816, 29120),
        (8192, 22016, 40512, 44032),
        (8192, 28672, 53248, 57344),
    ],
)
def test_dense_baselines(rows: int, columns: int, released: int, corrected: int) -> None:
    assert dense_cycles(rows, columns, Formula.RELEASED, Accelerator()) == released
    assert dense_cycles(rows, columns, Formula.CORRECTED, Accelerator()) == corrected


@given(masks())
def test_corrected_formula_weight_by_weight(mask_OI: Tensor) -> None:
    assert cycles(mask_OI, Formula.CORRECTED) == by_weight(mask_OI, Formula.CORRECTED)


@given(masks())
def test_released_formula_weight_by_weight(mask_OI: Tensor) -> None:
    rows, columns = mask_OI.shape
    patches = [mask_OI[:, start : start + rows] for start in range(0, columns, rows)]
    expected = sum(by_weight(patch_OI, Formula.RELEASED) for patch_OI in patches)
    assert cycles(mask_OI, Formula.RELEASED) == expected


def by_weight(mask_OI: Tensor, formula: Formula) -> int:
    """Walk over every weight, as slow and plain as the description."""
    mask = mask_OI.tolist()
    rows, columns = mask_OI.shape
    kept = {column: sum(mask[row][column] for row in range(rows)) for column in range(columns)}
    if not sum(kept.values()):
        return 0
    best = math.inf
    tenths = 5
    for _ in range(5):
        whole = [column for column in range(columns) if kept[column] > tenths / 10 * rows]
        products = scattered = in_whole = 0
        for row in range(rows):
            for column in range(columns):
                if column in whole:
                    products += 1
                    in_whole += mask[row][column]
                elif mask[row][column]:
                    scattered += 1
        width = int(SMALL.width * products / (products + scattered))
        if formula is Formula.RELEASED:
            products = columns * len(whole)
        elif whole and width == 0:
            width = 1
        busy = [0]
        if width:
            busy.append(math.ceil(products / (width * SMALL.height)))
        if width < SMALL.width:
            busy.append(math.ceil(scattered / ((SMALL.width - width) * SMALL.height)))
        best = min(best, max(busy))
        share = in_whole / (in_whole + scattered)
        if 0.4 < share < 0.6:
            break
        tenths += 1 if share >= 0.6 else -1
    return int(best)


@given(masks())
def test_no_faster_than_a_product_per_multiplier_and_cycle(mask_OI: Tensor) -> None:
    multipliers = SMALL.width * SMALL.height
    assert cycles(mask_OI, Formula.CORRECTED) * multipliers >= int(mask_OI.sum())


@given(masks())
def test_order_of_columns_does_not_matter(mask_OI: Tensor) -> None:
    order = torch.randperm(mask_OI.shape[1], generator=torch.Generator().manual_seed(0))
    assert cycles(mask_OI, Formula.CORRECTED) == cycles(mask_OI[:, order], Formula.CORRECTED)


@pytest.mark.parametrize(
    ("formula", "shape"),
    [
        (Formula.CORRECTED, (512, 512)),
        (Formula.CORRECTED, (1024, 384)),
        (Formula.CORRECTED, (384, 1024)),
        (Formula.RELEASED, (512, 512)),
    ],
)
def test_thinner_random_masks_take_fewer_cycles(formula: Formula, shape: tuple[int, int]) -> None:
    found = [cycles(random_mask(shape, zeros / 5), formula, Accelerator()) for zeros in range(6)]
    assert found == sorted(found, reverse=True)
    assert found[0] == dense_cycles(*shape, formula, Accelerator())
    assert found[-1] == 0


def test_released_formula_can_charge_more_for_zeros() -> None:
    # Scattered weights of a tall linear are charged in full, whole columns are not.
    tall = cycles(random_mask((1024, 384), 0.6), Formula.RELEASED, Accelerator())
    assert tall > dense_cycles(1024, 384, Formula.RELEASED, Accelerator())


def random_mask(shape: tuple[int, int], sparsity: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= sparsity


@given(masks())
def test_scattered_weights_alone_are_divided_evenly(mask_OI: Tensor) -> None:
    # At a tenth of the rows no column is whole, whatever share is tried.
    empty_OI = torch.zeros_like(mask_OI).repeat(9, 1)
    expected = math.ceil(int(mask_OI.sum()) / (SMALL.width * SMALL.height))
    assert cycles(torch.cat((mask_OI, empty_OI)), Formula.CORRECTED) == expected


def test_weights_are_loaded_with_their_places() -> None:
    # 16 bits per cycle: the dense linear has 8 x 4 weights of 4 bits.
    slow = Accelerator(memory=Memory(weight_bits=4, bandwidth=2.0, clock=1.0))
    assert dense_cycles(8, 4, Formula.CORRECTED, slow) == 8
    # Two whole columns; of the others, 24 positions as a bitmap are less than 12 row numbers of
    # 3 bits and 3 counts of 4.
    kept_I = torch.tensor([8, 8, 4, 4, 4])
    bits = 4 * (16 + 12) + 24
    assert pruned_cycles(kept_I, 8, Formula.CORRECTED, slow) == math.ceil(bits / 16)
    # One weight in 3 columns: 3 bits and 3 counts of 4 are less than 24.
    kept_I = torch.tensor([0, 1, 0])
    assert pruned_cycles(kept_I, 8, Formula.CORRECTED, slow) == math.ceil((4 + 3 + 12) / 16)


@given(masks())
def test_memory_that_is_fast_enough_changes_nothing(mask_OI: Tensor) -> None:
    fast = Accelerator(SMALL.width, SMALL.height, Memory(bandwidth=1e15))
    for formula in Formula:
        assert cycles(mask_OI, formula, fast) == cycles(mask_OI, formula)


def test_impossible_machines_are_refused() -> None:
    with pytest.raises(SecateurError, match="0 bits per weight"):
        Memory(weight_bits=0)
    with pytest.raises(SecateurError, match="1 x 64 multipliers cannot be divided"):
        Accelerator(width=1)
