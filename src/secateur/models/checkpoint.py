"""A checkpoint on disk: opened and checked here, once, before anything works on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.models.completeness import check_complete
from secateur.models.families import auto_class
from secateur.models.formats.format import WeightFormat
from secateur.models.formats.plain import Plain
from secateur.models.locate import Use, find_folder, load_config
from secateur.models.reader import CheckpointReader
from secateur.models.sanity import build_checked
from secateur.models.selection import choose_linears
from secateur.models.streamed import StreamedStore
from secateur.models.structure import BlockList
from secateur.models.tensors import TensorMap, divide, match_tensors
from secateur.models.text_path import find_blocks
from secateur.runs.device import SaveDtype
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files hold all that its model needs; no weights are in memory.

    Attributes:
        folder: where it lies.
        reader: its tensors, and its configuration.
        blocks: its structure, with parameters on the meta device.
        tensors: which tensor of the files belongs where.
    """

    folder: Path
    reader: CheckpointReader
    blocks: BlockList
    tensors: TensorMap

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        trust_remote_code: bool = False,
        save_dtype: SaveDtype = "source",
        progress: Progress = silent,
    ) -> Checkpoint:
        """Look at a checkpoint in a folder, on the hub or in a GGUF file, to change its blocks.

        Args:
            name: folder, name on the hub or file.
            trust_remote_code: let the checkpoint's own Python code run.
            save_dtype: that its tensors are shown in, and that the result has.
            progress: told of the conversion of a GGUF file.

        Raises:
            SecateurError: it cannot be read, or changed blocks could not be stored as they were.
        """
        found = cls.at(
            find_folder(name, progress),
            trust_remote_code=trust_remote_code,
            cast=None if save_dtype == "source" else getattr(torch, save_dtype),
        )
        if (trouble := found.tensors.trouble) is not None:
            raise SecateurError(
                f"{found.folder} cannot be written as it is stored, {trouble}; save the model anew "
                "with transformers if that stores its tensors plainly."
            )
        return found

    @classmethod
    def at(
        cls,
        folder: Path,
        *,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
        cast: torch.dtype | None = None,
        use: Use = "prune",
    ) -> Checkpoint:
        """Look at a folder.

        Args:
            folder: the checkpoint.
            trust_remote_code: let the checkpoint's own Python code run.
            dtype: the model is to be loaded in; the checkpoint's own if None.
            cast: dtype in which its tensors are shown; see ``CheckpointReader``.
            use: what is to be done with it.

        Raises:
            SecateurError: it cannot be read, not used so, or lacks a tensor.
        """
        reader = CheckpointReader(folder, cast=cast)
        config = load_config(folder, trust_remote_code=trust_remote_code, use=use, reader=reader)
        model = _skeleton(config, trust_remote_code, dtype or cast)
        matched = match_tensors(model, reader)
        check_complete(model, reader, matched)
        blocks = find_blocks(model)
        return cls(folder, reader, blocks, divide(matched, blocks, reader))

    def choosing(self, only: Sequence[str], skip: Sequence[str]) -> Self:
        """The same checkpoint with some linears left alone; as ``choose_linears``."""
        return replace(self, blocks=choose_linears(self.blocks, only, skip))

    def store(
        self,
        device: torch.device,
        output: Path | None = None,
        format: WeightFormat | None = None,
    ) -> StreamedStore:
        """Give out its blocks one at a time; arguments of ``StreamedStore``."""
        return StreamedStore(self.blocks, self.reader, self.tensors, output, device, format)

    def saved_bytes(self, format: WeightFormat, zeros: Mapping[str, int]) -> int:
        """Bytes of all its tensors with linears in a format, zeros given by full linear name."""
        size = self.reader.bytes_of(self.reader.files)
        if isinstance(format, Plain):
            return size
        for index, part in enumerate(self.tensors.blocks):
            for linear in self.blocks.linears(index):
                file = part.file_of(f"{linear.name}.weight")
                if linear.transposed or file is None:
                    continue
                rows, columns = linear.weight_OI.shape
                kept = rows * columns - zeros[f"{self.blocks.name(index)}.{linear.name}"]
                tensors = format.layout((rows, columns), self.reader.dtypes[file], kept)
                size += sum(each.nbytes for each in tensors.values()) - self.reader.bytes_of([file])
        return size

    @property
    def hidden_size(self) -> int:
        """Width of what blocks hand on."""
        return int(self.blocks.model.config.get_text_config().hidden_size)


def check_loads(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Hold the headers of a folder against its configuration; the model need have no blocks.

    Returns:
        the configuration, as it stands in the folder.

    Raises:
        SecateurError: a file cannot be read, transformers does not load the format, or a tensor
            is missing or of another shape.
    """
    reader = CheckpointReader(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code, use="load", reader=reader)
    model = _skeleton(copy.deepcopy(config), trust_remote_code, None)
    check_complete(model, reader, match_tensors(model, reader))
    return config


def _skeleton(
    config: PreTrainedConfig, trust_remote_code: bool, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Buffers such as embedding scales are rounded to the model's dtype, as they are on loading.
    loaded = dtype or config.dtype or torch.float32
    family = auto_class(config, trust_remote_code=trust_remote_code)
    assert family is not None, "the configuration was checked"

    def build() -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = family.from_config(
                config, trust_remote_code=trust_remote_code, dtype=loaded
            )
        return model

    model = build_checked(build, str(config.name_or_path))
    model.eval()
    return model
