"""Training text: windows of tokens in a fixed order, and some that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.calibration.packing import CHARACTERS_PER_TOKEN, tokenize
from secateur.calibration.sources import (
    TEXT_SUFFIXES,
    HubDataset,
    read_documents,
    resolve_source,
)
from secateur.checkpoint.files import write_safetensors
from secateur.errors import SecateurError
from secateur.progress import Progress, silent


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on and to validate with.

    Attributes:
        train_WL: int32 (windows, length), in the order of training; may be a mapped file.
        held_out_WL: int32, none of the above.
        parts: what the report says of each source.
    """

    train_WL: Tensor
    held_out_WL: Tensor
    parts: tuple[dict[str, Any], ...] = ()

    def write(self, path: Path) -> None:
        """Keep the windows in a file."""
        write_safetensors(path, {"train": self.train_WL, "held_out": self.held_out_WL})

    @classmethod
    def read(cls, path: Path) -> TrainingText:
        """Windows that were kept, mapped rather than read."""
        tensors = load_file(path)
        return cls(tensors["train"], tensors["held_out"])


def find_texts(names: Sequence[str]) -> list[Path | HubDataset]:
    """Resolve files, folders (their text files, by name) and hub data sets, in order.

    Raises:
        SecateurError: nothing of that name, a folder without text files, or no name at all.
    """
    if not names:
        raise SecateurError("Training needs text; name files, folders or hub data sets.")
    found: list[Path | HubDataset] = []
    for name in names:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            found.append(resolve_source(name))
            continue
        files = sorted(path for path in folder.rglob("*") if path.name.endswith(TEXT_SUFFIXES))
        if not files:
            raise SecateurError(
                f"The folder {name} holds no text files; put {', '.join(TEXT_SUFFIXES)} into it."
            )
        found += files
    return found


def load_text(
    sources: Sequence[Path | HubDataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    held_out: int,
    length: int,
    seed: int,
    progress: Progress = silent,
) -> TrainingText:
    """Tokenise sources, cut them into windows, and shuffle those of all sources together.

    No source is read further than the whole run could need. Held-out windows are drawn first, so
    they are the same for every budget of the same text that is read whole.

    Args:
        sources: from ``find_texts``.
        tokenizer: the model's.
        windows: to train on.
        held_out: to validate with.
        length: tokens per window.
        seed: decides the order.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: there is less text than asked for; the message has both numbers.
    """
    limit = (windows + held_out) * length
    parts: list[Tensor] = []
    facts = []
    for source in sources:
        documents = read_documents(
            source, split="train", characters=CHARACTERS_PER_TOKEN * limit + 1
        )
        stream = tokenize(documents, tokenizer, limit, progress)
        whole = len(stream.tokens_N) // length
        parts.append(stream.tokens_N[: whole * length].int().view(whole, length))
        name = source.label("train") if isinstance(source, HubDataset) else source.name
        facts.append({"source": name, "documents": stream.documents, "windows": whole})
    there = sum(len(part) for part in parts)
    if there < windows + held_out:
        raise SecateurError(
            f"Training needs {windows * length:,} tokens and {held_out * length:,} held-out ones, "
            f"and the text has {there * length:,} in whole windows; name more text or ask for "
            "fewer tokens."
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
    drawn_WL = torch.cat(parts)[order[: windows + held_out]]
    return TrainingText(drawn_WL[held_out:], drawn_WL[:held_out], tuple(facts))
