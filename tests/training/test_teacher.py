"""Cached targets are those of the model itself, and are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.models.text_path import find_blocks
from secateur.runs.progress import silent
from secateur.training import teacher
from secateur.training.distillation import FullTarget, TopTarget, cache_bytes
from secateur.training.holding import Holding
from secateur.training.teacher import CachedTeacher, ResidentTeacher

WINDOWS, LENGTH, COUNT = 7, 12, 16


@pytest.fixture
def model(checkpoints: Callable[..., Path]) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    return loaded.eval()


@pytest.fixture
def windows_WL() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, 260, (WINDOWS, LENGTH), generator=generator)


def make(folder: Path, model: PreTrainedModel, windows_WL: torch.Tensor) -> CachedTeacher:
    return CachedTeacher.make(
        folder,
        model,
        windows_WL,
        temperature=2.0,
        count=COUNT,
        batch=2,
        dtype=torch.float32,
        progress=silent,
    )


def test_resident_teacher_foresees_what_the_model_does(
    model: PreTrainedModel, windows_WL: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = (model(windows_WL[3:5]).logits[:, :-1].flatten(0, 1) / 2).log_softmax(-1)
    teacher = ResidentTeacher(Holding(find_blocks(model)), windows_WL, 2.0)
    target = teacher.targets(3, windows_WL[3:5])(slice(4, 20))
    assert isinstance(target, FullTarget)
    assert not target.teacher_PV.requires_grad
    torch.testing.assert_close(target.teacher_PV, expected[4:20])


def test_cached_teacher_across_files(
    model: PreTrainedModel,
    windows_WL: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "_FILE_WINDOWS", 3)
    cached = make(tmp_path, model, windows_WL)
    assert len(list(tmp_path.glob("targets-*"))) == 3
    found = cached.targets(1, windows_WL[1:5])(slice(0, 44))
    assert isinstance(found, TopTarget)
    with torch.no_grad():
        logits = model(windows_WL[1:5]).logits[:, :-1].flatten(0, 1)
    expected = TopTarget.of_logits(logits, 2.0, COUNT)
    torch.testing.assert_close(found.teacher_PK, expected.teacher_PK, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.rest_P, expected.rest_P)
    student_PV, none_P = torch.randn(44, 260).log_softmax(-1), torch.zeros(44)
    torch.testing.assert_close(
        *(each.compare(student_PV, none_P, student_PV.exp()) for each in (found, expected)),
        rtol=1e-2,
        atol=1e-2,
    )
    size = sum(path.stat().st_size for path in tmp_path.glob("targets-*"))
    assert cache_bytes(WINDOWS, LENGTH, COUNT) <= size < cache_bytes(WINDOWS, LENGTH, COUNT) + 1500


def test_files_that_are_there_are_not_made_again(
    model: PreTrainedModel,
    windows_WL: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "_FILE_WINDOWS", 3)
    make(tmp_path, model, windows_WL)
    first, second, _ = sorted(tmp_path.iterdir())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    stamp = first.stat().st_mtime_ns
    second.unlink()
    make(tmp_path, model, windows_WL)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert first.stat().st_mtime_ns == stamp
