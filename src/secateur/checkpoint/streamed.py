"""A checkpoint of which only one block is ever in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.architecture import BlockList
from secateur.checkpoint.files import copy_file, write_json, write_safetensors
from secateur.checkpoint.masks import write_masks
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.skeleton import TensorMap
from secateur.checkpoint.store import check_finite, least_precise, masks_path
from secateur.errors import SecateurError

_COPIED = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]


class StreamedStore:
    """Blocks are read from the source's files and written as one shard each.

    The output holds the same tensors under the same names and dtypes as the source; whatever is
    not part of a block is copied as it is. Without an output nothing can be saved.
    """

    def __init__(
        self,
        blocks: BlockList,
        reader: CheckpointReader,
        tensors: TensorMap,
        output: Path | None,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self._reader = reader
        self._tensors = tensors
        self._folder = output
        self._device = device

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        base = self.blocks.model.base_model
        names = self._tensors.outside
        tensors = self._reader.read(names.values())
        check_finite(tensors, prefix="outside the blocks")
        _assign(base, {name: tensors[file_name] for name, file_name in names.items()}, self._device)
        for name, buffer in base.named_buffers():
            if not name.startswith(self._inside_base()):
                _set(base, name, buffer.to(self._device))
        try:
            yield
        finally:
            _forget(base, names)

    @contextmanager
    def head(self) -> Iterator[None]:
        model = self.blocks.model
        names = self._tensors.head
        tensors = self._reader.read(names.values())
        check_finite(tensors, prefix="outside the blocks")
        state = {name: tensors[file_name] for name, file_name in names.items()}
        try:
            with self.embeddings():
                _assign(model, state, self._device)
                model.tie_weights()
                self._require_weights_outside_blocks()
                yield
        finally:
            _forget(model, names)
            model.tie_weights()

    def load(self, index: int) -> nn.Module:
        names = self._tensors.blocks[index]
        tensors = self._reader.read(names.values())
        state = {name: tensors[file_name] for name, file_name in names.items()}
        check_finite(state, self.blocks.name(index))
        return self._give_out(index, state)

    def load_finished(self, index: int) -> nn.Module:
        shard = CheckpointReader.of_file(self._output / self._shard(index))
        names = self._tensors.blocks[index]
        tensors = shard.read(names.values())
        return self._give_out(index, {name: tensors[file] for name, file in names.items()})

    def weight_dtype(self, index: int) -> torch.dtype:
        return least_precise(
            self._reader.dtypes[name] for name in self._tensors.blocks[index].values()
        )

    def save(self, index: int, masks: Mapping[str, Tensor]) -> None:
        state = self.blocks[index].state_dict()
        names = self._tensors.blocks[index]
        if masks:
            write_masks(masks_path(self._output, index), masks)
        write_safetensors(
            self._output / self._shard(index),
            {file: state[name].to(self._reader.dtypes[file]) for name, file in names.items()},
        )

    def release(self, index: int) -> None:
        _forget(self.blocks[index], self._tensors.blocks[index])
        _return_freed_memory()

    def finish(self, changed: Mapping[str, Tensor] | None = None) -> None:
        """Write what is not part of a block, then the index.

        Args:
            changed: tensors by name in the file that are not to be copied from the source.
        """
        rest = self._shard(len(self.blocks))
        changed = changed or {}
        copied = self._reader.read(name for name in self._tensors.rest if name not in changed)
        write_safetensors(self._output / rest, {**copied, **changed})
        files = dict.fromkeys(self._tensors.rest, rest)
        for index, names in enumerate(self._tensors.blocks):
            files |= dict.fromkeys(names.values(), self._shard(index))
        copy_side_files(self._reader.folder, self._output)
        # The index comes last: a folder that has one is complete.
        write_index(self._output, files, self._reader.bytes_of(files))

    @property
    def _output(self) -> Path:
        assert self._folder is not None, "a store without an output only reads"
        return self._folder

    def _require_weights_outside_blocks(self) -> None:
        for name, parameter in self.blocks.model.named_parameters():
            if parameter.is_meta and not name.startswith(f"{self.blocks.prefix}."):
                raise SecateurError(
                    f"{name} is not in the files of {self._reader.folder} under that name, so the "
                    "model's loss cannot be computed; choose another allocation."
                )

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


def write_index(output: Path, files: Mapping[str, str], size: int) -> None:
    """Say which file holds which tensor, and how many bytes they are together."""
    write_json(
        output / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))},
    )


def copy_side_files(source: Path, output: Path) -> None:
    """Copy configuration, tokenizer and licence files; weights and their index stay behind."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not path.name.endswith(".index.json"):
                copy_file(path, output / path.name)


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


def _forget(module: nn.Module, names: Mapping[str, str]) -> None:
    parameters = dict(module.named_parameters())
    for name in names:
        if name in parameters:
            _set(module, name, parameters[name].data.to("meta"))
