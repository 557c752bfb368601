"""Dequantise a GGUF file into a plain fp32 checkpoint, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub import ModelCardData
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)

from secateur.models.files import CARD, CONVERSION, write_index
from secateur.models.gguf_header import read_gguf_header
from secateur.runs.errors import SecateurError, explained
from secateur.runs.files import cache_folder, remove, write_json, write_safetensors, write_text
from secateur.runs.progress import Progress

# Tensors are gathered up to this size; a larger one has a file of its own.
_SHARD_BYTES = 1 << 28
_CHUNK = 1 << 24
_ACTION = "fetch it again, or name the checkpoint folder it was made from."


def convert(path: Path, progress: Progress) -> Path:
    """Return the folder of a GGUF file's weights as a plain checkpoint, made once for its bytes.

    Tensors, configuration and tokenizer are those that transformers makes of the file.

    Raises:
        SecateurError: there is no such file, it is damaged, or transformers does not read it.
    """
    if not path.is_file():
        raise SecateurError(f"There is no file {path}; check the path.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SecateurError(f"{path} is no GGUF file; name one, or a checkpoint folder.")
    folder = cache_folder() / "gguf" / f"{path.stem}-{_digest(path, progress)[:32]}"
    if _whole(folder):
        return folder
    part = folder.with_name(folder.name + ".part")
    for each in (part, folder):
        remove(each)
    part.mkdir(parents=True)
    try:
        with explained(f"{path} cannot be read as GGUF", _ACTION):
            _write(path, part, progress)
        sizes = {each.name: each.stat().st_size for each in part.iterdir()}
        write_json(part / CONVERSION, sizes)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def describe(path: Path, folder: Path) -> dict[str, torch.Size]:
    """Write the configuration of a GGUF file's model into a folder; read no weights.

    Returns:
        shape of every tensor of the plain fp32 checkpoint that ``convert`` would make.

    Raises:
        SecateurError: there is no such file, it is damaged, or transformers does not read it.
    """
    held = read_gguf_header(path).parameters
    with explained(f"{path} cannot be read as GGUF", _ACTION):
        model = _empty_model(path)
        _write_config(model, folder)
    tied = model.all_tied_weights_keys or {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    wanted = sum(shape.numel() for shape in shapes.values())
    if wanted > held:
        raise SecateurError(
            f"{path} describes a model of {wanted:,} numbers and holds {held:,}; fetch it again."
        )
    return shapes


def _empty_model(path: Path) -> PreTrainedModel:
    """The model that transformers sees in a file, its parameters on the meta device."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _digest(path: Path, progress: Progress) -> str:
    digest, size, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress("Reading the GGUF file", done, size)
    return digest.hexdigest()


def _whole(folder: Path) -> bool:
    """Whether everything that a conversion left is still there."""
    try:
        sizes = json.loads((folder / CONVERSION).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _write(path: Path, folder: Path, progress: Progress) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    model = _empty_model(path)
    (architecture,) = read_field(reader, "general.architecture")
    shards = _Shards(folder)
    if is_gguf_arch_supported(architecture):
        # transformers converts these while it loads; it gives no tensor by itself.
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        for name, tensor in loaded.state_dict().items():
            if name not in loaded.all_tied_weights_keys:
                shards.add(name, tensor)
    else:
        for name, tensor in _tensors(reader, path, model, progress):
            shards.add(name, tensor)
    tied = model.all_tied_weights_keys or {}
    if missing := [name for name in model.state_dict() if name not in {*shards.files, *tied}]:
        raise SecateurError(f"{path} lacks {missing[0]}; fetch it again.")
    shards.finish()
    _write_config(model, folder)
    model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    _write_card(reader, folder)


def _tensors(
    reader: Any, path: Path, model: PreTrainedModel, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Give the model's tensors one by one; what is made of several in the file comes when whole."""
    from gguf import dequantize

    parsed = load_gguf_checkpoint(str(path))
    (architecture,) = read_field(reader, "general.architecture")
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=parsed["config"])
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)

    def target(tensor: Any) -> str:
        return names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"), "")

    ordered = sorted(reader.tensors, key=target)
    done = 0
    for name, pieces in groupby(ordered, key=target):
        # Processors put what they join of several pieces here.
        joined: dict[str, Any] = {"tensors": {}}
        for piece in pieces:
            progress("Converting the GGUF file", done, len(ordered))
            done += 1
            if not name:
                continue
            made = processor.process(
                weights=dequantize(piece.data, piece.tensor_type),
                name=piece.name,
                tensor_key_mapping=names,
                parsed_parameters=joined,
            )
            if made.name in names:
                yield names[made.name], torch.from_numpy(np.copy(made.weights)).float()
        yield from ((key, tensor.float()) for key, tensor in joined["tensors"].items())
    progress("Converting the GGUF file", len(ordered), len(ordered))


class _Shards:
    """Writes tensors as they come."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, str] = {}
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = self._count = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._bytes + tensor.nbytes > _SHARD_BYTES:
            self._flush()
        self._held[name] = tensor
        self._bytes += tensor.nbytes
        self.files[name] = self._name()

    def finish(self) -> None:
        """Write the last shard, then the index."""
        self._flush()
        write_index(self._folder, self.files, self._total)

    def _name(self) -> str:
        return f"model-{self._count + 1:05d}.safetensors"

    def _flush(self) -> None:
        if self._held:
            write_safetensors(self._folder / self._name(), self._held)
            self._count += 1
        self._total += self._bytes
        self._held, self._bytes = {}, 0


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the configuration of plain weights; that of the file speaks of quantised ones."""
    plain: dict[str, Any] = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        plain.pop(name, None)
    config = type(model.config).from_dict(plain)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)


def _write_card(reader: Any, folder: Path) -> None:
    """Write a card with what the file says of licence and language."""

    def texts(name: str) -> list[str]:
        return [each for each in read_field(reader, f"general.{name}") if isinstance(each, str)]

    keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    said: dict[str, Any] = {key: next(iter(texts(name)), None) for key, name in keys.items()}
    data = ModelCardData(language=texts("languages") or None, **said)
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n")
