"""Export a checkpoint to what another runtime reads."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

from pydantic import BaseModel, Field

from secateur.models.checkpoint import Checkpoint
from secateur.models.locate import find_folder
from secateur.runs.errors import SecateurError
from secateur.runs.options import Options
from secateur.runs.progress import Progress, silent
from secateur.text.options import CalibrationOptions

Target = Literal["gguf", "openvino"]
Type = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "int8", "w8a8"]

# The modules that name the types of a target, which load its package.
_TYPES = {"gguf": "gguf.types", "openvino": "openvino"}


class ExportOptions(Options):
    """What a type asks for beside its name."""

    noun: ClassVar[str] = "export options"

    # Scales of activations need little text.
    calibration: CalibrationOptions = Field(
        default_factory=lambda: CalibrationOptions(samples=32),
        description="text for the activations of w8a8",
    )


class ExportResult(BaseModel):
    """A file or folder that another runtime reads.

    Attributes:
        file: where it is.
        bytes: its size.
        architecture: what the runtime calls the model's, or transformers where it does not.
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
    to: Target = "gguf",
    type: Type = "f16",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> ExportResult:
    """Write a checkpoint as one file for llama.cpp, or as a folder for OpenVINO.

    In a GGUF file blocks of different sizes become the architecture ``deci``, and one tensor at a
    time is in memory. For OpenVINO all of the model is.

    Args:
        model: checkpoint folder, hub id or GGUF file.
        output: the file or folder, which is not there yet.
        to: what it is for.
        type: how matrices are stored; f32, f16 and bf16 everywhere, int8 and w8a8 for OpenVINO, the
            others in a GGUF file.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: told how far it is.
        options: of ``ExportOptions``, for the type w8a8.

    Raises:
        SecateurError: the checkpoint cannot be read, the runtime would not compute the same, the
            type does not fit, a package is missing, or the output is there or cannot be written.
    """
    path = Path(output).expanduser()
    if path.exists():
        raise SecateurError(f"{path} is there already; name a new one, or remove it first.")
    known = get_args(import_module(f"secateur.deploy.{_TYPES[to]}").Type)
    if type not in known:
        raise SecateurError(f"{to} has no type {type}; use --type {', '.join(known)}.")
    chosen = ExportOptions.of(**options)
    if options and type != "w8a8":
        raise SecateurError(f"The type {type} needs no calibration text; leave it out.")
    folder = find_folder(model, progress)
    if to == "gguf":
        # Of a model on the hub or in a GGUF file, the folder is one in a cache.
        name = Path(model).expanduser().resolve().name.removesuffix(".gguf")
        architecture, notes = _write_gguf(path, folder, name, type, trust_remote_code, progress)
    else:
        from secateur.deploy import openvino

        architecture, notes = openvino.write(
            path,
            folder,
            cast(openvino.Type, type),
            chosen.calibration,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    files = [path] if path.is_file() else path.iterdir()
    return ExportResult(
        file=str(path),
        bytes=sum(file.stat().st_size for file in files),
        architecture=architecture,
        type=type,
        notes=notes,
    )


def _write_gguf(
    path: Path, folder: Path, name: str, type: str, trust_remote_code: bool, progress: Progress
) -> tuple[str, list[str]]:
    from secateur.deploy.gguf.architecture import describe
    from secateur.deploy.gguf.tokenizer import describe_tokenizer
    from secateur.deploy.gguf.types import Type, choose_types, note_on_types
    from secateur.deploy.gguf.writer import write

    own = cast(Type, type)
    checkpoint = Checkpoint.at(folder, trust_remote_code=trust_remote_code, use="read")
    architecture = describe(checkpoint)
    types = choose_types(architecture.tensors, len(checkpoint.blocks), own)
    vocabulary = describe_tokenizer(folder, architecture.rows, trust_remote_code=trust_remote_code)
    write(path, name, architecture, vocabulary, own, types, progress)
    larger = note_on_types(types, own)
    return architecture.name, [*vocabulary.notes, *([] if larger is None else [larger])]
