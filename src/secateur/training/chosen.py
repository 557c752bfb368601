"""The best weights that held-out text has seen so far, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from secateur.runs.files import read_sealed, write_safetensors


class Chosen:
    """Keeps the weights of the lowest held-out loss, the earliest where losses are equal.

    A resumed run offers what it had offered before it was killed once more, with the same loss,
    and so ends with the same choice.
    """

    def __init__(self, path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
        self._path = path
        self._parameters = parameters
        self._lowest = float("inf")
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                self._lowest = float(file.get_tensor("loss"))

    def offer(self, loss: float) -> None:
        """Keep the weights as they are now, if their loss is lower than any before."""
        if loss < self._lowest:
            self._lowest = loss
            weights = {f"weight.{name}": each for name, each in self._parameters.items()}
            number = torch.tensor(loss, dtype=torch.float64)
            write_safetensors(self._path, {"loss": number, **weights}, sealed=True)

    def take(self) -> float:
        """Put the chosen weights into the parameters; returns their loss."""
        state = read_sealed(self._path)
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[f"weight.{name}"])
        return float(state["loss"])
