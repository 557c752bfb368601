"""Export a checkpoint to a file of another runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from secateur.deploy.gguf.architecture import describe
from secateur.deploy.gguf.tokenizer import describe_tokenizer
from secateur.deploy.gguf.types import Type, choose_types, note_on_types
from secateur.deploy.gguf.writer import write
from secateur.models.checkpoint import Checkpoint
from secateur.models.locate import find_folder
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent


class ExportResult(BaseModel):
    """A file that another runtime reads.

    Attributes:
        file: where it is.
        bytes: its size.
        architecture: what the runtime calls the model's.
        type: how matrices are stored.
        notes: what the user should know.
    """

    file: str
    bytes: int
    architecture: str
    type: Type
    notes: list[str]


def export(
    model: str | Path,
    output: str | os.PathLike[str],
    *,
    to: Literal["gguf"] = "gguf",
    type: Type = "f16",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Write a checkpoint as one file for llama.cpp.

    Blocks of different sizes become the architecture ``deci``. One tensor at a time is in memory.

    Args:
        model: checkpoint folder, hub id or GGUF file.
        output: the file, which is not there yet.
        to: format of the file.
        type: how matrices are stored.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: told of the tensors.

    Raises:
        SecateurError: the checkpoint cannot be read, llama.cpp would not compute the same, the
            type does not fit, or the file is there or cannot be written.
    """
    path = Path(output).expanduser()
    if path.exists():
        raise SecateurError(f"{path} is there already; name a new file, or remove it first.")
    folder = find_folder(model, progress)
    checkpoint = Checkpoint.at(folder, trust_remote_code=trust_remote_code, use="read")
    architecture = describe(checkpoint)
    types = choose_types(architecture.tensors, len(checkpoint.blocks), type)
    vocabulary = describe_tokenizer(folder, architecture.rows, trust_remote_code=trust_remote_code)
    # Of a model on the hub or in a GGUF file, the folder is one in a cache.
    name = Path(model).expanduser().resolve().name.removesuffix(".gguf")
    write(path, name, architecture, vocabulary, type, types, progress)
    larger = note_on_types(types, type)
    return ExportResult(
        file=str(path),
        bytes=path.stat().st_size,
        architecture=architecture.name,
        type=type,
        notes=[*vocabulary.notes, *([] if larger is None else [larger])],
    )
