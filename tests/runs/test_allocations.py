"""The peak is that of tensors which live at the same time."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.runs.allocations import peak_allocation


def test_what_lives_together_counts_together() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.zeros(1000)

    def together() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        torch.cat([second, second])

    assert peak_allocation(one_after_the_other) == 4000
    assert peak_allocation(together) == 12_000


def test_temporary_memory_of_an_operation_counts() -> None:
    matrix = torch.eye(100)
    assert peak_allocation(lambda: torch.linalg.cholesky(matrix)) >= 40_000


def test_a_mapped_file_takes_nothing(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(10_000)}, tmp_path / "file.safetensors")

    def read() -> None:
        with safe_open(tmp_path / "file.safetensors", "pt") as file:
            file.get_tensor("weight")[:10].clone()

    assert peak_allocation(read) < 1000


def test_the_environment_stays_as_it_was() -> None:
    before = dict(os.environ)
    peak_allocation(lambda: None)
    assert dict(os.environ) == before
