from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.models.masks import block_masks, masks_path, write_masks
from secateur.runs.errors import SecateurError


def test_masks_come_back_whatever_their_width(tmp_path: Path) -> None:
    block = nn.ModuleDict({"a": nn.Linear(13, 3), "b": nn.Linear(8, 1)})
    masks = {name: torch.rand_like(block[name].weight) > 0.5 for name in "ab"}
    write_masks(masks_path(tmp_path, 2), masks)
    found = block_masks(tmp_path, 2, block)
    assert all(torch.equal(found[name], masks[name]) for name in "ab")
    assert block_masks(tmp_path, 1, block) is None


@pytest.mark.parametrize("names", ["abc", "ac"])
def test_masks_of_another_model_are_refused(names: str, tmp_path: Path) -> None:
    block = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 3)})
    write_masks(masks_path(tmp_path, 0), {name: torch.ones(3, 8) > 0 for name in names})
    with pytest.raises(SecateurError, match="masks of other linears"):
        block_masks(tmp_path, 0, block)
