"""A checkpoint on disk: opened and checked here, once, before anything works on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from secateur.models.families import auto_class
from secateur.models.formats.format import WeightFormat
from secateur.models.locate import Use, find_folder, load_config
from secateur.models.reader import CheckpointReader
from secateur.models.sanity import build_checked
from secateur.models.selection import choose_linears
from secateur.models.streamed import StreamedStore, TensorMap
from secateur.models.structure import BlockList
from secateur.models.text_path import find_blocks
from secateur.runs.errors import SecateurError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint; no weights are in memory.

    Attributes:
        folder: where it lies.
        reader: its tensors, and its configuration.
        blocks: its structure, with parameters on the meta device.
        mapped: which tensor of the files belongs where, or a phrase that says why none can be
            read without loading the whole model.
    """

    folder: Path
    reader: CheckpointReader
    blocks: BlockList
    mapped: TensorMap | str

    @classmethod
    def open(
        cls, name: str | Path, *, trust_remote_code: bool = False, by_block: bool = True
    ) -> Checkpoint:
        """Look at a checkpoint in a folder, on the hub or in a GGUF file.

        Args:
            name: folder, name on the hub or file.
            trust_remote_code: let the checkpoint's own Python code run.
            by_block: refuse one that cannot be read block by block.

        Raises:
            SecateurError: it cannot be read, or not as asked.
        """
        found = cls.at(find_folder(name), trust_remote_code=trust_remote_code)
        if by_block and isinstance(found.mapped, str):
            raise SecateurError(
                f"{found.folder} cannot be read block by block: {found.mapped}; save the model "
                "anew with transformers if that stores its tensors plainly."
            )
        return found

    @classmethod
    def at(
        cls,
        folder: Path,
        *,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
        use: Use = "prune",
    ) -> Checkpoint:
        """Look at a folder.

        Args:
            folder: the checkpoint.
            trust_remote_code: let the checkpoint's own Python code run.
            dtype: the model is to be loaded in; the checkpoint's own if None.
            use: what is to be done with it.

        Raises:
            SecateurError: it cannot be read, or not used so.
        """
        config = load_config(folder, trust_remote_code=trust_remote_code, use=use)
        reader = CheckpointReader(folder)
        blocks = find_blocks(_skeleton(config, trust_remote_code, dtype))
        return cls(folder, reader, blocks, map_tensors(blocks, reader))

    def choosing(self, only: Sequence[str], skip: Sequence[str]) -> Self:
        """The same checkpoint with some linears left alone; as ``choose_linears``."""
        return replace(self, blocks=choose_linears(self.blocks, only, skip))

    @property
    def tensors(self) -> TensorMap:
        """Which tensor of the files belongs where, of a checkpoint that can be read by block."""
        assert not isinstance(self.mapped, str), "it can be read by block"
        return self.mapped

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
        if isinstance(self.mapped, str):
            return size
        for index, names in enumerate(self.mapped.blocks):
            for linear in self.blocks.linears(index):
                if linear.transposed:
                    continue
                file = names[f"{linear.name}.weight"]
                rows, columns = linear.weight_OI.shape
                kept = rows * columns - zeros[f"{self.blocks.name(index)}.{linear.name}"]
                tensors = format.layout((rows, columns), self.reader.dtypes[file], kept)
                size += sum(each.nbytes for each in tensors.values()) - self.reader.bytes_of([file])
        return size

    @property
    def hidden_size(self) -> int:
        """Width of what blocks hand on."""
        return int(self.blocks.model.config.get_text_config().hidden_size)


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


def map_tensors(blocks: BlockList, reader: CheckpointReader) -> TensorMap | str:
    """Match parameters and file tensors one to one, or say in a phrase why that fails.

    Raises:
        SecateurError: a tensor has another shape than the configuration asks for.
    """
    model = blocks.model
    transforms = get_model_conversion_mapping(model)
    for transform in transforms:
        if isinstance(transform, WeightConverter):
            for name in reader.files:
                if transform.rename_source_key(name)[1] is not None:
                    return f"{name} is stored apart and joined with others on loading"

    base = model.base_model
    base_prefix = f"{model.base_model_prefix}." if base is not model else ""

    def place(name: str, tensor: Tensor) -> str:
        candidates = (name, name.removeprefix(base_prefix), base_prefix + name)
        found = next((each for each in candidates if each in reader.files), None)
        if found is None:
            raise LookupError(f"{name} is not in the files under that name")
        stored, expected = reader.shapes[found], tuple(tensor.shape)
        if stored != expected:
            raise SecateurError(
                f"{found} in {reader.folder} has shape {list(stored)} where config.json asks for "
                f"{list(expected)}; the configuration and the weights do not belong together."
            )
        return found

    try:
        # The state of a block is its parameters and persistent buffers, as in a checkpoint.
        in_blocks = [
            {name: place(f"{blocks.name(index)}.{name}", each) for name, each in state.items()}
            for index, state in enumerate(block.state_dict() for block in blocks)
        ]
        outside = {
            name: place(base_prefix + name, each)
            for name, each in base.named_parameters()
            if not f"{base_prefix}{name}".startswith(f"{blocks.prefix}.")
        }
    except LookupError as missing:
        return str(missing)

    own_names = {name for name, _ in model.named_parameters()} - {
        base_prefix + name for name, _ in base.named_parameters()
    }
    used = {file_name for names in in_blocks for file_name in names.values()}
    rest = [name for name in reader.files if name not in used]
    head = {}
    for name in rest:
        # Some heads have another name in the file than in the model.
        renamed = name
        for transform in transforms:
            renamed, _ = transform.rename_source_key(renamed)
        if renamed in own_names:
            head[renamed] = name
    return TensorMap(in_blocks, outside, head, rest)
