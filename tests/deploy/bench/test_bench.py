"""Tiny models in the runtimes themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import secateur
from children import is_gone
from runtime_files import write_openvino
from secateur.cli import app
from secateur.deploy.bench import bench as module
from secateur.deploy.bench.runtimes.runtime import Settings
from secateur.deploy.bench.samples import Sample, write_gguf
from secateur.deploy.bench.worker import Task, worker
from secateur.runs.errors import SecateurError

SMALL = {"prefill": 16, "prompt": 8, "decode": 4, "threads": 1, "limit": 2, "batch": "1,3"}

TINY = Sample(width=32, channels=64, heads=4, groups=2, head=8, blocks=2)

pytest.importorskip("xllamacpp")
pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def models(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runtimes")
    write_gguf(root / "one.gguf", TINY, "F32")
    write_gguf(root / "wide.gguf", replace(TINY, channels=2048), "F32")
    write_openvino(root / "graph")
    shutil.copytree(checkpoints("llama"), root / "folder")
    return {path.stem: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def measured(models: dict[str, Path]) -> secateur.Bench:
    paths = [models[name] for name in ("folder", "one", "graph")]
    return secateur.bench(paths, against=models["folder"], **SMALL)


def test_each_model_runs_in_its_runtime(measured: secateur.Bench) -> None:
    assert [(each.label, each.runtime, each.form) for each in measured.models] == [
        ("folder in transformers", "transformers", measured.models[0].form),
        ("folder (2) in transformers", "transformers", measured.models[0].form),
        ("one.gguf in llama.cpp", "llama.cpp", "F32"),
        ("graph in openvino", "openvino", measured.models[3].form),
    ]
    assert measured.models[3].form.startswith("f32")
    assert all(each.version for each in measured.models)
    assert [each.memory.before < each.memory.peak for each in measured.models] == [True] * 4
    assert [each.memory.loaded <= each.memory.peak for each in measured.models] == [True] * 4
    assert "the ratio is one of runtimes" in " ".join(measured.notes)


def test_every_figure_has_its_turns(measured: secateur.Bench) -> None:
    for model in measured.models:
        found = [(each.work, each.batch, each.tokens) for each in model.figures]
        first = [("load", 1, 0), ("prefill", 1, 16), ("decode", 1, 4)]
        assert found[:3] == first
        # A machine that does much else may leave larger batches out, and says so.
        left_out = [note for note in measured.notes if "is left out" in note]
        assert set(found[3:]) <= {("prefill", 3, 16), ("decode", 3, 4)}
        assert len(found) + len(left_out) == 5
        assert all(len(each.repetitions) >= 5 for each in model.figures)
        assert all(each.clock == "processor" for each in model.figures)
        assert all((each.ratio is None) == (model is measured.models[0]) for each in model.figures)


def test_a_model_is_as_fast_as_itself(measured: secateur.Bench) -> None:
    ratios = {each.work: each.ratio for each in measured.models[1].figures if each.work != "load"}
    for ratio in ratios.values():
        assert ratio is not None
        # Turns of milliseconds on a machine that runs other tests.
        assert 0.5 < ratio.median < 2
        assert ratio.range[0] <= ratio.interval[0] <= ratio.median <= ratio.interval[1]


def test_more_work_takes_longer_and_the_page_says_what_was_measured(
    models: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    report = {"sub_blocks": [{"block": 0, "kind": "ffn", "kept": 1, "of": 2}], "model": "some"}
    (run / "report.json").write_text(json.dumps(report))
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    words = ["bench", str(models["one"]), "--against", str(models["wide"]), "--report", str(run)]
    done = CliRunner().invoke(app, [*words, *flags, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    by_work = {each["work"]: each for each in found["models"][1]["figures"]}
    assert by_work["prefill"]["ratio"]["median"] > 1.5
    assert json.loads((run / "secateur" / "bench-one.json").read_text()) == found
    page = (run / "secateur" / "report.html").read_text()
    assert "What runs faster" in page
    assert "prefill, times faster" in page
    assert "Nothing here was measured" not in page


def refused(path: Path, **changes: object) -> str:
    with pytest.raises(SecateurError) as error:
        secateur.bench([path], **{**SMALL, **changes})
    return str(error.value)


def test_what_cannot_be_measured_is_a_sentence(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "There is no file or folder" in refused(tmp_path / "gone")
    assert "model.safetensors is missing" in refused(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("words")
    assert "No runtime opens" in refused(text)
    other = tmp_path / "other.gguf"
    other.write_text("words")
    assert "is no GGUF file" in refused(other)
    whole = models["one"].read_bytes()
    for length in (30, 3000, len(whole) - 100):
        other.write_bytes(whole[:length])
        assert "cannot be read as GGUF" in refused(other)
    cut = tmp_path / "cut"
    shutil.copytree(models["folder"], cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert str(weights) in refused(cut)
    graph = tmp_path / "graph"
    shutil.copytree(models["graph"], graph)
    (graph / "openvino_model.bin").write_bytes(b"")
    assert "export it again" in refused(graph)
    assert "has 256 positions, and 301 are needed" in refused(models["one"], prefill=300)
    assert "--runtimes leaves out" in refused(models["one"], runtimes=["openvino"])
    assert "cores here for 4000 threads" in refused(models["one"], threads=4000)
    free = SimpleNamespace(available=1000)
    with monkeypatch.context() as patch:
        patch.setattr(module.psutil, "virtual_memory", lambda: free)
        assert "All models together need about" in refused(models["one"])
    monkeypatch.setattr(module, "is_installed", lambda runtime: False)
    monkeypatch.setattr("secateur.deploy.bench.runtimes.runtime.is_installed", lambda _: False)
    assert "pip install 'secateur[llama]'" in refused(models["one"])


def test_a_process_that_dies_is_a_sentence_and_none_stays(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with (
        pytest.raises(SecateurError, match="The process of one ended with signal SIGKILL"),
        worker("one", "llama.cpp", models["one"], Settings(1, 1, 20), 260) as own,
    ):
        own.begin(Task("load"))
        assert own.run(None) is not None
        number = tmp_path / "pid"
        number.write_text(str(own.pid))
        os.kill(own.pid, signal.SIGKILL)
        own.begin(Task("decode"))
        own.run(None)
    assert is_gone(number)
    with (
        pytest.raises(KeyboardInterrupt),
        worker("one", "llama.cpp", models["one"], Settings(1, 1, 20), 260) as own,
    ):
        number.write_text(str(own.pid))
        own.begin(Task("load"))
        # It is stopped when the end comes.
        assert own.run(0.001) is None
        raise KeyboardInterrupt
    assert is_gone(number)


def test_what_a_runtime_says_is_passed_on(models: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = models["one"].read_bytes()
    other.write_bytes(content.replace(b"ffn_down", b"ffn_dawn", 1))
    with pytest.raises(SecateurError, match=r"other\.gguf cannot be measured"):
        secateur.bench([other], **SMALL)
