"""The checkpoint that is shrunk: its files, its structure, its configuration's own words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from secateur.models.checkpoint import Checkpoint
from secateur.models.saved_config import saved_config
from secateur.runs.device import SaveDtype
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress, silent

_WIDTHS = ("ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size")


class SizeNames(NamedTuple):
    """Keys of a configuration: numbers of query heads, of key-value groups, of channels.

    Heads and groups have the same key where each head is a group of its own.
    """

    heads: str
    groups: str
    width: str


@dataclass(frozen=True)
class Source(Checkpoint):
    """A checkpoint that can be cut.

    Attributes:
        config: its config.json.
        names: what that calls the sizes that shrink.
        trust_remote_code: whether the checkpoint's own code may run.
    """

    config: dict[str, Any]
    names: SizeNames
    trust_remote_code: bool


def open_source(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    save_dtype: SaveDtype = "source",
    progress: Progress = silent,
) -> Source:
    """Look at a checkpoint's headers and configuration; arguments of ``Checkpoint.open``.

    Raises:
        SecateurError: it cannot be read, or it is stored in a way that cannot be cut.
    """
    found = Checkpoint.open(
        model, trust_remote_code=trust_remote_code, save_dtype=save_dtype, progress=progress
    )
    if (joined := found.tensors.joined) is not None:
        raise SecateurError(
            f"{found.folder} cannot be cut: {joined}; save the model anew with transformers if "
            "that stores its tensors plainly."
        )
    config = saved_config(found.reader, found.blocks.model.config)
    if "per_layer_config" in config:
        raise SecateurError(
            f"The blocks of {found.folder} differ in width already; shrink the model it was made "
            "from, to the size you want."
        )
    names = _size_names(found.blocks.model.config, found.folder)
    return Source(
        found.folder, found.reader, found.blocks, found.tensors, config, names, trust_remote_code
    )


def _size_names(config: PretrainedConfig, folder: Path) -> SizeNames:
    if config.get_text_config() is not config:
        raise SecateurError(
            f"{folder} holds a model of several parts ({config.model_type}); shrink a checkpoint "
            "of its language model alone."
        )
    heads = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    grouped = getattr(config, "num_key_value_heads", None) is not None
    width = next((name for name in _WIDTHS if hasattr(config, name)), _WIDTHS[-1])
    return SizeNames(heads, "num_key_value_heads" if grouped else heads, width)
