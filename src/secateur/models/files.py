"""Which files of a checkpoint folder are its weights, and which belong beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from secateur.runs.errors import SecateurError
from secateur.runs.files import copy_file, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
# It says what its own folder holds, so it is read of a source and never copied.
CARD = "README.md"

SIDE_FILES = "*.json *.txt *.model *.jinja *.tiktoken *.py LICENSE* NOTICE*".split()
# What a folder says of the GGUF file that it was converted from.
CONVERSION = "converted.json"
# They say how other weights than those of the folder are read, or how these came to be.
_LEFT_BEHIND = (
    "*.index.json adapter_*.json quantize_config.json quant_config.json quantization_config.json "
    "hf_quant_config.json params.json trainer_state.json *_results.json optimizer* scheduler* "
    f"training_args* {CONVERSION}"
).split()
_PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.bin")
_POINTER = b"version https://git-lfs"
# A pointer has three short lines.
_POINTER_BYTES = 1024


@dataclass(frozen=True)
class WeightFiles:
    """The files that ``from_pretrained`` reads.

    Attributes:
        names: of the files, inside the folder.
        listed: file of every tensor that the index lists; empty without an index.
    """

    names: list[str]
    listed: dict[str, str] = field(default_factory=dict)


def find_weights(folder: Path) -> WeightFiles:
    """Return the files of a checkpoint's weights.

    They are ``model.safetensors`` or the shards of the index, as for transformers; any other file
    in the folder is none of them.

    Raises:
        SecateurError: there are none, files contradict each other, an adapter lies beside them, or
            a name or a link leads out of the folder.
    """
    _refuse_adapter(folder)
    listed = read_index(folder)
    shards = sorted(set(listed.values()))
    single = (folder / SINGLE).is_file()
    if single and shards not in ([], [SINGLE]):
        raise SecateurError(
            f"{folder} holds both {SINGLE} and {INDEX}, which lists other files such as "
            f"{next(each for each in shards if each != SINGLE)}; move away those that are not the "
            "model's."
        )
    names = shards or [SINGLE]
    if not shards and not single:
        raise _no_weights(folder)
    for name in names:
        check_file(folder, name)
    return WeightFiles(names, listed)


def _check_inside(folder: Path, path: Path) -> None:
    """Raise SecateurError if a file of a folder is a link that leads out of it.

    Links between the folders of one repository in the cache of huggingface_hub are no way out.
    """
    if not _is_inside(folder, path):
        raise SecateurError(
            f"{path} is a link that leads out of {folder}; put the file itself there if you trust "
            "it."
        )


def _check_no_pointer(path: Path) -> None:
    """Raise SecateurError if Git LFS has left a pointer in place of a file."""
    if path.stat().st_size <= _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
        raise SecateurError(
            f"{path} is a pointer of Git LFS and not the file itself; run `git lfs pull` in "
            f"{path.parent}."
        )


def copy_side_files(source: Path, output: Path) -> None:
    """Copy configuration, tokenizer, code and licence files.

    Weights, files that change how a folder loads, states of training and links that lead out of
    the folder stay behind.
    """
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            left = any(fnmatch(path.name, each) for each in _LEFT_BEHIND)
            if not left and path.is_file() and _is_inside(source, path):
                copy_file(path, output / path.name)


def _refuse_adapter(folder: Path) -> None:
    """Raise SecateurError if a folder holds an adapter, alone or beside a model."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    if (folder / "config.json").is_file() and (
        (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    ):
        weights = SINGLE if (folder / SINGLE).is_file() else INDEX
        raise SecateurError(
            f"{folder} holds the adapter {ADAPTER} beside {weights}, and programs differ in "
            "whether they apply it; merge it with peft's merge_and_unload, or move it away."
        )
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = "its model"
    raise SecateurError(
        f"{folder} holds an adapter of {base} and no model; merge the two with peft's "
        "merge_and_unload and save the result."
    )


def _no_weights(folder: Path) -> SecateurError:
    for pattern in _PICKLED:
        for path in sorted(folder.glob(pattern)):
            return SecateurError(
                f"{folder} holds pickled weights ({path.name}), which can run code when they are "
                "read; load them with transformers where you trust them, and save_pretrained "
                "writes safetensors."
            )
    others = sorted(folder.glob("*.safetensors"))
    if others:
        return SecateurError(
            f"{folder / SINGLE} is missing, and so is {INDEX}; {others[0].name} is not read, as "
            "transformers does not read it either."
        )
    return SecateurError(
        f"{folder / SINGLE} is missing; a checkpoint folder with safetensors files was expected."
    )


def check_file(folder: Path, name: str) -> None:
    """Raise SecateurError unless a file is there, inside the folder and no pointer."""
    path = folder / name
    if not path.is_file():
        raise SecateurError(
            f"{path} is missing; a checkpoint folder with safetensors files was expected."
        )
    _check_inside(folder, path)
    _check_no_pointer(path)


def _is_inside(folder: Path, path: Path) -> bool:
    real = path.resolve()
    root = folder.resolve()
    # In the hub's cache, a snapshot is a folder of links to the blobs of its repository.
    repositories = [each for each in root.parents if each.name.startswith("models--")]
    if root.parent.name == "snapshots" and repositories:
        root = repositories[0]
    return real.is_relative_to(root)


def read_index(folder: Path) -> dict[str, str]:
    """The index of a sharded checkpoint, with every file name kept inside the folder."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    check_file(folder, INDEX)
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        whole = bool(listed) and all(
            isinstance(each, str) for pair in listed.items() for each in pair
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SecateurError(f"{path} is no index of a checkpoint; fetch it again.") from error
    if not whole:
        raise SecateurError(f"{path} is no index of a checkpoint; fetch it again.")
    for file in sorted(set(listed.values())):
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise SecateurError(
                f"{path} names the file {file} outside its own folder; "
                "use a checkpoint from a source you trust."
            )
    return dict(listed)


def write_index(output: Path, files: Mapping[str, str], size: int) -> None:
    """Say which file holds which tensor, and how many bytes they are together."""
    write_json(
        output / INDEX,
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))},
    )
