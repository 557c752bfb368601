"""The lowest loss is kept, the earliest of equal ones, across processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from secateur.training.chosen import Chosen


def test_lowest_and_earliest(tmp_path: Path) -> None:
    path, weight = tmp_path / "chosen.safetensors", nn.Parameter(torch.zeros(2))
    chosen = Chosen(path, {"w": weight})
    for value, loss in ((1.0, 3.0), (2.0, 2.0), (3.0, 2.5)):
        weight.data.fill_(value)
        chosen.offer(loss)
    again = Chosen(path, {"w": weight})
    for value, loss in ((4.0, 2.0), (5.0, float("nan"))):
        weight.data.fill_(value)
        again.offer(loss)
    assert again.take() == 2.0
    assert weight.tolist() == [2.0, 2.0]
