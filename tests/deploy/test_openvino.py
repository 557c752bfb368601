"""Folders for OpenVINO compute there what the checkpoint computes in transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.deploy.bench.runtimes.openvino import OpenVino, inputs_of
from secateur.deploy.bench.runtimes.runtime import Settings
from secateur.shrinking.export import export as save_shrunk
from secateur.shrinking.layout import plan_layout
from secateur.shrinking.source import open_source
from secateur.shrinking.units import find_sub_blocks
from tiny import make_checkpoint

pytest.importorskip("openvino")
pytest.importorskip("nncf")
pytest.importorskip("openvino_tokenizers")

PROMPT = [5, 9, 2, 40, 17]
SETTINGS = Settings(threads=1, batch=1, length=32)


def make(folder: Path, family: str, **changes: Any) -> Path:
    make_checkpoint(family, folder, **changes)
    return folder


def greedy(folder: Path, tokens: int, **options: Any) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def spoken(folder: Path, tokens: int) -> list[int]:
    """What the model of a folder goes on with, keeping keys and values."""
    session = OpenVino().load(folder, SETTINGS)
    request = session.request  # type: ignore[attr-defined]
    session.generate([PROMPT], 1, lambda: None)
    found, seen = [], len(PROMPT)
    while True:
        found.append(int(request.get_output_tensor(0).data[0, -1].argmax()))
        if len(found) == tokens:
            return found
        request.infer(inputs_of(np.array([found[-1:]], np.int64), seen))
        seen += 1


def keeps_zeros(folder: Path, zeros_OI: torch.Tensor) -> bool:
    """Whether one matrix of integers is zero wherever it has to be; rounding may add more."""
    import openvino

    matrices = [
        node.get_data()
        for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8
    ]
    same_shape = [each for each in matrices if each.shape == tuple(zeros_OI.shape)]
    return sum(not each[zeros_OI.numpy()].any() for each in same_shape) == 1


@pytest.mark.slow
def test_blocks_of_different_sizes_keep_their_text(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", "llama", num_hidden_layers=3)
    source = open_source(dense)
    sub_blocks = find_sub_blocks(source.blocks)
    # A whole block, one without attention, one without feed-forward and with half of its heads.
    share = {"attention": (1.0, 0.0, 0.5), "ffn": (1.0, 0.5, 0.0)}
    kept = [torch.arange(int(share[each.kind][each.block] * each.units)) for each in sub_blocks]
    widths = [each.width_of(units) for each, units in zip(sub_blocks, kept, strict=True)]
    layout = plan_layout(source, sub_blocks, widths, "uneven")
    save_shrunk(source, sub_blocks, kept, layout, tmp_path / "model")
    with pytest.raises(secateur.SecateurError, match="--trust-remote-code"):
        secateur.export(tmp_path / "model", tmp_path / "out", to="openvino")
    made = secateur.export(
        tmp_path / "model", tmp_path / "out", to="openvino", type="f32", trust_remote_code=True
    )
    assert made.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert spoken(tmp_path / "out", 6) == greedy(tmp_path / "model", 6, trust_remote_code=True)


@pytest.mark.slow
def test_int8_keeps_zeros_and_says_what_it_changes(tmp_path: Path) -> None:
    import openvino
    import openvino_tokenizers  # noqa: F401 - it registers the operations of tokenizers

    folder = make(tmp_path / "model", "qwen3", num_hidden_layers=2, max_window_layers=2)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    zeros_OI = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors[name] = tensors[name].masked_fill(zeros_OI, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = secateur.export(folder, tmp_path / "out", to="openvino", type="int8")
    assert any("nats a token" in note for note in made.notes)

    core = openvino.Core()
    model = core.read_model(tmp_path / "out" / "openvino_model.xml")
    assert "runtime_options" not in model.get_rt_info()
    assert keeps_zeros(tmp_path / "out", zeros_OI)
    # Attention and its cache are one operation, as they are in models of optimum-intel.
    running = core.compile_model(model, "CPU").get_runtime_model()
    kinds = [str(node.get_rt_info()["layerType"].value) for node in running.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 2

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encode = core.compile_model(tmp_path / "out" / "openvino_tokenizer.xml", "CPU")
    text = tokenizer.decode(PROMPT)
    assert encode([text])["input_ids"].tolist() == tokenizer([text])["input_ids"]


@pytest.mark.slow
def test_activations_in_eight_bits_keep_zeros(tmp_path: Path, text_file: Path) -> None:
    folder = make(tmp_path / "model", "llama", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    zeros_OI = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors[name] = tensors[name].masked_fill(zeros_OI, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = {"source": str(text_file), "samples": 4, "length": 16}
    secateur.export(folder, tmp_path / "out", to="openvino", type="w8a8", calibration=text)
    assert keeps_zeros(tmp_path / "out", zeros_OI)
    runtime = OpenVino().load(tmp_path / "out", SETTINGS)
    runtime.generate([PROMPT], 1, lambda: None)
    assert runtime.kernel.lower().endswith("i8")


def test_what_cannot_be_exported_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model", "llama")

    def refusal(**options: Any) -> str:
        with pytest.raises(secateur.SecateurError) as caught:
            secateur.export(folder, tmp_path / "out", to="openvino", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
        return str(caught.value)

    assert "openvino has no type q8_0; use --type f32, f16, bf16, int8" in refusal(type="q8_0")
    assert "needs no calibration text" in refusal(calibration={"samples": 8})
    monkeypatch.setattr("secateur.deploy.openvino.find_spec", {"openvino": 1}.get)
    assert "nncf, openvino-tokenizers" in refusal()
    monkeypatch.undo()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e9
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(type="f16")


def test_a_model_that_comes_out_different_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model", "llama", num_hidden_layers=1)
    monkeypatch.setattr("secateur.deploy.openvino._TOLERANCE", 0.0)
    with pytest.raises(secateur.SecateurError, match="nothing was written"):
        secateur.export(folder, tmp_path / "out", to="openvino")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_reported_over_the_network() -> None:
    program = (
        "import sys; import secateur.deploy.openvino; import openvino, nncf, openvino_tokenizers;"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
