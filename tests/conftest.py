"""Tiny models and tokenizers that many tests share."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Code that comes with checkpoints is copied there before it runs.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="secateur-modules-")
# Processes of xdist inherit what the first of them found.
os.environ.setdefault("SECATEUR_USER_CACHE", os.environ.get("SECATEUR_CACHE", ""))
os.environ["SECATEUR_CACHE"] = tempfile.mkdtemp(prefix="secateur-cache-")

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerBase

from tiny import FAMILIES, make_checkpoint, make_tokenizer

logging.getLogger("transformers").setLevel(logging.ERROR)
# A machine that does other things as well is slow, not wrong.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
for name in ("HF_MODULES_CACHE", "SECATEUR_CACHE"):
    atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with real models: one of them at the end would keep a process alone."""
    items.sort(key=lambda item: item.path.name != "test_smollm2.py")


@pytest.fixture(scope="module")
def user_cache() -> Iterator[None]:
    """Keep real models where ``make demo`` keeps them, for the next run of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", os.environ["SECATEUR_USER_CACHE"])
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes the checkpoint of a family once per session."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-") / "model"
            make_checkpoint(family, folder, dtype)
            made[family, dtype] = folder
        return made[family, dtype]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is long enough to calibrate a tiny model."""
    words = "the cat sat on a mat and the dog ran to the red house by the sea".split()
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(0, len(words), (2000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in order), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def reference_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two disjoint halves of the language reference: one to fit on, one to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    names = sorted(topics)
    for file, part in (("fit.txt", names[::2]), ("judge.txt", names[1::2])):
        (folder / file).write_text("\n\n".join(topics[name] for name in part), encoding="utf-8")
    return folder / "fit.txt", folder / "judge.txt"


__all__ = ["FAMILIES"]
