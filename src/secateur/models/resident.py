"""A model that is in memory as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.models.masks import masks_path, write_masks
from secateur.models.store import check_finite, least_precise
from secateur.models.structure import BlockList
from secateur.runs.files import move_file, write_safetensors, writing
from secateur.solvers.grids import QuantizedSolution


class ResidentStore:
    """Blocks are worked on where they are; with an output folder they are saved at the end.

    Used for a model that the caller already holds, which is changed in place.
    """

    def __init__(self, blocks: BlockList, output: Path | None, device: torch.device) -> None:
        self.blocks = blocks
        self._output = output
        self._device = device
        self._home = {name: p.device for name, p in blocks.model.named_parameters()}
        self._trained = {n for n, p in blocks.model.named_parameters() if p.requires_grad}
        self._dtypes = [
            {name: tensor.dtype for name, tensor in block.state_dict().items()} for block in blocks
        ]

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        model = self.blocks.model
        outside = [
            tensor
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if not name.startswith(f"{self.blocks.prefix}.")
        ]
        homes = [(tensor.device, tensor.dtype) for tensor in outside]
        for tensor in outside:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(self._device, dtype)
        try:
            yield
        finally:
            for tensor, (device, dtype) in zip(outside, homes, strict=True):
                tensor.data = tensor.data.to(device, dtype)

    def head(self) -> AbstractContextManager[None]:
        return self.embeddings()

    def load(self, index: int) -> nn.Module:
        block = self.blocks[index]
        check_finite(block.state_dict(), f"{self.blocks.name(index)}.")
        return self._give_out(block)

    def load_finished(self, index: int) -> nn.Module:
        block = self.blocks[index]
        block.load_state_dict(load_file(self._finished(index)))
        return self._give_out(block)

    def weight_dtype(self, index: int) -> torch.dtype:
        return least_precise(self._dtypes[index].values())

    def save(
        self,
        index: int,
        masks: Mapping[str, Tensor] | None,
        quantised: Mapping[str, QuantizedSolution] | None = None,
    ) -> None:
        if self._output is None:
            return
        write_masks(masks_path(self._output, index), masks or {})
        state = self.blocks[index].state_dict()
        dtypes = self._dtypes[index]
        write_safetensors(
            self._finished(index), {name: tensor.to(dtypes[name]) for name, tensor in state.items()}
        )

    def written(self, index: int) -> list[Path]:
        if self._output is None:
            return []
        return [self._finished(index), masks_path(self._output, index)]

    def release(self, index: int) -> None:
        block = self.blocks[index]
        for name, parameter in block.named_parameters():
            full_name = f"{self.blocks.name(index)}.{name}"
            parameter.data = parameter.data.to(self._home[full_name], self._dtypes[index][name])
            # Passes of stages leave gradients behind, and train some parameters alone.
            parameter.grad = None
            parameter.requires_grad_(full_name in self._trained)

    def finish(self) -> None:
        if self._output is None:
            return
        part = self._output / "secateur" / "saving"
        shutil.rmtree(part, ignore_errors=True)
        with writing(part):
            self.blocks.model.save_pretrained(part)
        # The index, or the single file, comes last: a folder that has one is complete.
        for path in sorted(part.iterdir(), key=lambda path: path.name.endswith(".index.json")):
            move_file(path, self._output / path.name)
        part.rmdir()

    def _give_out(self, block: nn.Module) -> nn.Module:
        block.to(self._device)
        for parameter in block.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        return block

    def _finished(self, index: int) -> Path:
        assert self._output is not None
        return self._output / "secateur" / "blocks" / f"block-{index:03d}.safetensors"
