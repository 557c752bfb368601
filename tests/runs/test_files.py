from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur.runs import files
from secateur.runs.errors import SecateurError


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"kept": True})
    with pytest.raises(TypeError):
        files.write_json(path, {"bad": object()})
    assert path.read_text() == '{\n  "kept": true\n}\n'
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SecateurError, match=r"disk is full while writing .*a\.safetensors"):
        files.write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_tensors_round_trip(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    files.write_safetensors(tmp_path / "new" / "a.safetensors", {"x": x.T})
    assert torch.equal(load_file(tmp_path / "new" / "a.safetensors")["x"], x.T)
