"""A checkpoint of which only one block is ever in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.models.files import copy_side_files, write_index
from secateur.models.formats.format import FinishedLinear, WeightFormat, stored_name
from secateur.models.formats.plain import Plain
from secateur.models.masks import masks_path, write_masks
from secateur.models.reader import CheckpointReader
from secateur.models.saved_config import saved_config
from secateur.models.store import check_finite, least_precise
from secateur.models.structure import ROUTERS, BlockList
from secateur.models.tensors import Part, TensorMap
from secateur.runs.files import write_json, write_safetensors
from secateur.solvers.grids import QuantizedSolution


class StreamedStore:
    """Blocks are read from the source's files and written as one shard each.

    The output holds the same tensors under the same names and dtypes as the source, linears in
    the given format; whatever is not part of a block is copied as it is. Without an output
    nothing can be saved.
    """

    def __init__(
        self,
        blocks: BlockList,
        reader: CheckpointReader,
        tensors: TensorMap,
        output: Path | None,
        device: torch.device,
        format: WeightFormat | None = None,
    ) -> None:
        self.blocks = blocks
        self._format = format or Plain()
        self._reader = reader
        self._tensors = tensors
        self._folder = output
        self._device = device

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        self._load_embeddings()
        try:
            yield
        finally:
            _forget(self.blocks.model.base_model, self._tensors.outside)

    @contextmanager
    def head(self) -> Iterator[None]:
        model = self.blocks.model
        try:
            with self.embeddings():
                self._load_head()
                yield
        finally:
            _forget(model, self._tensors.head)
            self._tie()

    def load_outside(self) -> None:
        """Load everything outside the blocks, to stay."""
        self._load_embeddings()
        self._load_head()

    def check_outside(self) -> None:
        """Raise SecateurError if a weight outside the blocks, the head included, is not finite."""
        for part in (self._tensors.outside, self._tensors.head):
            for file in part.files:
                check_finite({file: self._reader.mapped(file)})

    def load(self, index: int) -> nn.Module:
        state = self._tensors.blocks[index].read(self._reader)
        check_finite(state, f"{self.blocks.name(index)}.")
        return self._give_out(index, state)

    def load_finished(self, index: int) -> nn.Module:
        return self._give_out(index, self._tensors.blocks[index].read(self._saved(index)))

    def weight_dtype(self, index: int) -> torch.dtype:
        part, reader = self._tensors.blocks[index], self._reader
        files = [
            file
            for name in part.names
            for file in part.files_of(name)
            if len(reader.shapes[file]) > 1 and ROUTERS.isdisjoint(name.split("."))
        ]
        return least_precise(reader.dtypes[file] for file in files or part.files)

    def save(
        self,
        index: int,
        masks: Mapping[str, Tensor] | None,
        quantised: Mapping[str, QuantizedSolution] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a block; the tensors it holds, or those given by name."""
        block = self.blocks[index]
        state = block.state_dict() if state is None else state
        if masks is not None:
            write_masks(masks_path(self._output, index), masks)
        masks = masks or {}
        part = self._tensors.blocks[index]
        tensors: dict[str, Tensor] = {}
        if not isinstance(self._format, Plain):
            for linear in self.blocks.linears(index):
                name = f"{linear.name}.weight"
                file = part.file_of(name)
                if linear.transposed or file is None:
                    continue
                weight, mask_OI = state[name], masks.get(linear.name)
                finished = FinishedLinear(
                    weight,
                    self._reader.dtypes[file],
                    None if mask_OI is None else mask_OI.to(weight.device),
                    None if quantised is None else quantised.get(linear.name),
                )
                for piece, tensor in self._format.encode(finished).items():
                    tensors[stored_name(file, piece)] = tensor
                state = {other: each for other, each in state.items() if other != name}
        tensors |= part.stored(state, self._reader.dtypes)
        write_safetensors(self._output / self._shard(index), tensors)

    def written(self, index: int) -> list[Path]:
        masks = masks_path(self._output, index)
        return [self._output / self._shard(index), *([masks] if masks.is_file() else [])]

    def release(self, index: int) -> None:
        _forget(self.blocks[index], self._tensors.blocks[index])
        _return_freed_memory()

    def finish(self, changed: Mapping[str, Tensor] | None = None) -> None:
        """Write what is not part of a block, then the index.

        Args:
            changed: tensors by name in the file that are not to be copied from the source.
        """
        count = len(self.blocks)
        changed = changed or {}
        # Mapped, for embeddings may be larger than any block.
        rest = [name for name in self._tensors.rest if name not in changed]
        copied = {name: self._reader.mapped(name) for name in rest}
        write_safetensors(self._output / self._shard(count), {**copied, **changed})
        written = [self._saved(index) for index in range(count + 1)]
        copy_side_files(self._reader.folder, self._output)
        config = saved_config(self._reader, self.blocks.model.config)
        if described := self._format.describe(self.blocks):
            config["quantization_config"] = described
        if config != self._reader.config:
            write_json(self._output / "config.json", config)
        # The index comes last: a folder that has one is complete.
        write_index(
            self._output,
            {name: file for shard in written for name, file in shard.homes.items()},
            sum(shard.bytes_of(shard.files) for shard in written),
        )

    def _saved(self, index: int) -> CheckpointReader:
        return CheckpointReader(self._output, [self._shard(index)], self._format)

    @property
    def _output(self) -> Path:
        assert self._folder is not None, "a store without an output only reads"
        return self._folder

    def _load_embeddings(self) -> None:
        base = self.blocks.model.base_model
        _assign(base, self._read_outside(self._tensors.outside), self._device)
        for name, buffer in base.named_buffers():
            if not name.startswith(self._inside_base()):
                _set(base, name, buffer.to(self._device))

    def _load_head(self) -> None:
        _assign(self.blocks.model, self._read_outside(self._tensors.head), self._device)
        self._tie()

    def _tie(self) -> None:
        """Let tied parameters be one, unless the files hold both and they differ."""
        missing = set(self._tensors.shared)
        self.blocks.model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def _read_outside(self, part: Part) -> dict[str, Tensor]:
        tensors = part.read(self._reader)
        check_finite(tensors)
        return tensors

    def _shard(self, index: int) -> str:
        return shard_name(index, len(self.blocks))

    def _give_out(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        block = self.blocks[index]
        _assign(block, state, self._device)
        for name, buffer in block.named_buffers():
            _set(block, name, buffer.to(self._device))
        return block

    def _inside_base(self) -> str:
        model = self.blocks.model
        return self.blocks.prefix.removeprefix(f"{model.base_model_prefix}.") + "."


def shard_name(index: int, blocks: int) -> str:
    """File of one block; what is in no block comes behind the last one."""
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def _return_freed_memory() -> None:
    """Give pages of the last block back: an allocator that keeps them lets memory creep up."""
    # Where there is no such library or function, another allocator has its own ways.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _assign(module: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> None:
    for name, tensor in state.items():
        value = (
            tensor.to(device, torch.float32) if tensor.is_floating_point() else tensor.to(device)
        )
        _set(module, name, value)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _forget(module: nn.Module, part: Part) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in part.names:
        if name in parameters:
            _set(module, name, parameters[name].data.to("meta"))
