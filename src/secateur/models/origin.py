"""Where a model comes from, as far as its own files say: name on the hub, licence, language."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard
from pydantic import BaseModel, Field

from secateur.models.files import CARD
from secateur.runs.files import is_signed

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The folder of a repository in the cache of huggingface_hub.
_CACHED = re.compile(r"models--(.+)--(.+)")
_WORD = re.compile(r"[\w.+-]{1,96}")
_LINK = re.compile(r"https?://[^\s<>\"]{1,500}")


class Origin(BaseModel):
    """What the files of a model say of it; nothing is guessed."""

    base_model: str | None = Field(None, description="its name on the hub")
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = []


def read_origin(name: str, folder: Path | None) -> Origin:
    """Read the card beside a checkpoint, if there is one.

    Args:
        name: of the model, as the user gave it.
        folder: where its files are; None for a model in memory.
    """
    base = name if _NAME.fullmatch(name) and not Path(name).exists() else None
    if folder is None:
        return Origin(base_model=base)
    cached = [_CACHED.fullmatch(each.name) for each in folder.resolve().parents]
    base = base or next((f"{each[1]}/{each[2]}" for each in cached if each), None)
    path = folder / CARD
    try:
        said = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:
        # Whatever a damaged card raises, it says nothing.
        return Origin(base_model=base)
    if base is None and is_signed(path):
        base = _match(_NAME, said.get("base_model"))
    languages = said.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    return Origin(
        base_model=base,
        license=_match(_WORD, said.get("license")),
        license_name=_match(_WORD, said.get("license_name")),
        license_link=_match(_LINK, said.get("license_link")),
        language=[each for each in languages if _match(_WORD, each)],
    )


def _match(pattern: re.Pattern[str], value: object) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
