"""What the dense model foresees: asked at every step, or once before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from secateur.blocks.precision import forward_precision
from secateur.evaluation.predictions import Readout, find_readout
from secateur.runs.files import read_sealed, write_safetensors
from secateur.runs.limits import rows_at_once
from secateur.runs.progress import Progress
from secateur.training.distillation import FullTarget, Target, TopTarget
from secateur.training.holding import Holding
from secateur.training.ranks import ALONE, Ranks

_FILE_WINDOWS = 64
# Logits of the teacher that exist at one time while they are cached.
_LOGITS = 2**25


class ResidentTeacher:
    """A dense model in memory; its logits are made when they are asked for."""

    def __init__(self, holding: Holding, tokens_WL: Tensor, temperature: float) -> None:
        self._holding = holding
        self._readout = holding.evaluate(lambda: find_readout(holding.model, tokens_WL))
        self._temperature = temperature

    @torch.no_grad()
    def targets(self, first: int, tokens_WL: Tensor) -> Callable[[slice], Target]:
        states_WLD = self._holding.forward(lambda: self._readout.states(tokens_WL))
        states_PD = states_WLD[:, :-1].flatten(0, 1)
        return lambda part: self._target(states_PD[part])

    @torch.no_grad()
    def _target(self, state_PD: Tensor) -> FullTarget:
        logits_PV = self._readout.project(state_PD).float()
        return FullTarget((logits_PV / self._temperature).log_softmax(-1))


class CachedTeacher:
    """Files of the likeliest tokens, their log-probabilities, and the log of the rest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    @torch.no_grad()
    def make(
        cls,
        folder: Path,
        model: PreTrainedModel,
        windows_WL: Tensor,
        *,
        temperature: float,
        count: int,
        batch: int,
        dtype: torch.dtype,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> CachedTeacher:
        """Write the files that are not there yet; several processes divide them.

        Args:
            folder: where the files go.
            model: the dense model.
            windows_WL: training text, in the order of training.
            temperature: of the probabilities.
            count: tokens to keep at each position.
            batch: windows in one forward pass.
            dtype: of forward passes.
            progress: told how many windows are done.
            ranks: the processes of the run.
        """
        readout = find_readout(model, windows_WL[:1])
        for index, first in enumerate(range(0, len(windows_WL), _FILE_WINDOWS)):
            if index % ranks.world != ranks.rank:
                continue
            windows = windows_WL[first : first + _FILE_WINDOWS]
            path = _part(folder, first)
            if path.is_file():
                read_sealed(path)
            else:
                with forward_precision(dtype, model.device):
                    rows = [
                        _likeliest(readout, tokens.to(model.device), temperature, count)
                        for tokens in windows.split(batch)
                    ]
                write_safetensors(
                    path,
                    {name: torch.cat([row[name] for row in rows]) for name in rows[0]},
                    sealed=True,
                )
            progress("Asking the teacher", first + len(windows), len(windows_WL))
        ranks.wait()
        return cls(folder)

    def targets(self, first: int, tokens_WL: Tensor) -> Callable[[slice], Target]:
        rows = [self._window(index) for index in range(first, first + len(tokens_WL))]
        teacher_PK, token_PK, rest_P = (
            torch.cat(part).to(tokens_WL.device) for part in zip(*rows, strict=True)
        )
        return lambda part: TopTarget(teacher_PK[part], token_PK[part], rest_P[part])

    def _window(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        row = index % _FILE_WINDOWS
        with safe_open(_part(self._folder, index - row), framework="pt") as file:
            logarithms, tokens, rest = (
                file.get_slice(name)[row] for name in ("log_probabilities", "tokens", "log_rest")
            )
        # Autocast on the CPU does not take half precision.
        return logarithms.float(), tokens.long(), rest


def _part(folder: Path, first: int) -> Path:
    return folder / f"targets-{first:08d}.safetensors"


def _likeliest(
    readout: Readout, tokens_WL: Tensor, temperature: float, count: int
) -> dict[str, Tensor]:
    windows, length = tokens_WL.shape
    states_PD = readout.states(tokens_WL)[:, :-1].flatten(0, 1)
    step = rows_at_once(_LOGITS, readout.project(states_PD[:1]).shape[-1])
    parts = [
        TopTarget.of_logits(readout.project(state_PD), temperature, count)
        for state_PD in states_PD.split(step)
    ]
    shape = (windows, length - 1)
    return {
        "log_probabilities": torch.cat([p.teacher_PK for p in parts]).half().unflatten(0, shape),
        "tokens": torch.cat([p.token_PK for p in parts]).int().unflatten(0, shape),
        "log_rest": torch.cat([p.rest_P for p in parts]).unflatten(0, shape),
    }
