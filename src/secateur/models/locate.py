"""Turn what the user names - a folder, a hub id, a GGUF file - into a local checkpoint folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.models.families import auto_class, has_own_code
from secateur.models.files import (
    CARD,
    INDEX,
    SIDE_FILES,
    SINGLE,
    check_file,
    read_index,
)
from secateur.models.formats import FORMATS
from secateur.models.formats.format import recognise
from secateur.models.gguf import convert
from secateur.models.reader import CheckpointReader
from secateur.models.sanity import check_configuration, check_generation
from secateur.models.store import check_finite
from secateur.runs.errors import SecateurError, explained, reason_of
from secateur.runs.progress import Progress, silent

# Other copies of the weights lie in folders of their own.
_UNWANTED = "original/* onnx/* gguf/* openvino/*".split()

Use = Literal["prune", "load", "read"]
"""What is done with weights: plain ones can be pruned, transformers loads some formats more, and
``CheckpointReader`` reads all that are registered."""


def find_folder(model: str | Path, progress: Progress = silent) -> Path:
    """Return a local folder with ``config.json`` and safetensors for ``model``.

    A hub id is downloaded by huggingface_hub into its cache; a GGUF file is dequantised once
    into a folder of the user's cache.

    Raises:
        SecateurError: nothing of that name.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return convert(path, progress)
    if path.is_dir():
        return path
    if path.exists():
        raise SecateurError(
            f"{path} is a file; name a checkpoint folder, a .gguf file or a hub id such as "
            "HuggingFaceTB/SmolLM2-135M."
        )
    return _from_hub(str(model))


def load_config(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    use: Use = "prune",
    reader: CheckpointReader | None = None,
) -> PreTrainedConfig:
    """Return the configuration of a causal language model.

    Args:
        folder: the checkpoint.
        trust_remote_code: let the checkpoint's own Python code run.
        use: what is to be done with the weights.
        reader: of the folder, if its headers have been read.

    Raises:
        SecateurError: no readable weights or configuration, another kind of model, or weights in
            a format that does not serve the use.
    """
    reader = reader or CheckpointReader(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise SecateurError(f"{folder} has no config.json; name a Hugging Face checkpoint folder.")
    check_file(folder, path.name)
    check_configuration(folder, reader.shapes.values())
    check_generation(folder)
    with explained(
        f"The configuration in {folder} cannot be read",
        "check config.json, or allow its own code with --trust-remote-code if you trust it.",
    ):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    if has_own_code(config) and not trust_remote_code and config.is_heterogeneous:
        raise SecateurError(
            f"The blocks of {folder} differ in width, which its own code builds; allow it with "
            "--trust-remote-code if you trust it."
        )
    if auto_class(config, trust_remote_code=trust_remote_code) is None:
        raise SecateurError(
            f"{folder} holds a model of type {config.model_type}, which is not a causal language "
            "model; name one that AutoModelForCausalLM or AutoModelForImageTextToText loads."
        )
    described = getattr(config, "quantization_config", None)
    if described is None:
        return config
    found = recognise(described)
    if use == "prune":
        form = "quantised weights" if found is None else f"weights in the format {found.name}"
        raise SecateurError(
            f"{folder} holds {form}; prune the plain, unquantised checkpoint it was made from."
        )
    if found is None:
        raise SecateurError(
            f"{folder} holds quantised weights in a form that is not read; the formats "
            f"{', '.join(FORMATS)} are."
        )
    if use == "load" and not found.loads:
        raise SecateurError(
            f"{folder} holds weights in the format {found.name}, which transformers does not "
            "load; make the checkpoint again in the format plain."
        )
    found.require_package()
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer.

    Raises:
        SecateurError: the folder has none.
    """
    with explained(
        f"{folder} has no usable tokenizer",
        "copy tokenizer.json and tokenizer_config.json of the model into it.",
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    return tokenizer


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Read a whole model onto a device, for inference; dtype ``auto`` is that of its files.

    Raises:
        SecateurError: the files cannot be loaded, not every weight comes from them, or one is not
            finite.
    """
    model = open_model(folder, dtype, device, trust_remote_code=trust_remote_code)
    check_finite(dict(model.named_parameters()))
    return model


def open_model(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Do what ``load_model`` does without a look at every number, which takes time of its own.

    Raises:
        SecateurError: the files cannot be loaded, or not every weight comes from them.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code, use="load")
    build = auto_class(config, trust_remote_code=trust_remote_code)
    assert build is not None, "the configuration was checked"
    with explained(f"{folder} cannot be loaded", "check its files, or fetch or make it again."):
        answer = build.from_pretrained(
            folder,
            dtype=dtype,
            device_map=str(device),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = cast(tuple[PreTrainedModel, dict[str, Collection[Any]]], answer)
    # transformers fills what is missing with random numbers.
    missing = [str(name) for name in report["missing_keys"]]
    missing += [str(each[0]) for each in report["mismatched_keys"]]
    if missing:
        raise SecateurError(
            f"The files of {folder} do not give {min(missing)}; fetch or make the checkpoint again."
        )
    model.eval()
    return model


def fetch_side_files(name: str) -> Path:
    """Fetch all of a model on the hub but its weights; return its folder in the cache.

    Raises:
        SecateurError: there is none of that name, or it cannot be reached.
    """
    with _hub_explained(name):
        beside = [*SIDE_FILES, CARD]
        return Path(snapshot_download(name, allow_patterns=beside, ignore_patterns=_UNWANTED))


def no_safetensors(name: str) -> SecateurError:
    """What to say of a model on the hub without readable weights."""
    return SecateurError(
        f"{name} has no safetensors files on the hub; use a revision or a copy that has them."
    )


@contextmanager
def _hub_explained(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into a sentence."""
    try:
        yield
    except HFValidationError as error:
        raise SecateurError(f"There is no folder or file {name}; check the path.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SecateurError(
            f"{name} is no local folder and could not be fetched from the hub "
            f"({reason_of(error)}); check the name, the network and your access."
        ) from error


def _from_hub(name: str) -> Path:
    folder = fetch_side_files(name)
    with _hub_explained(name):
        # Of the weights, those alone that transformers reads, of the same commit.
        weights = sorted({SINGLE, *read_index(folder).values()})
        snapshot_download(name, revision=folder.name, allow_patterns=weights)
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise no_safetensors(name)
    return folder
