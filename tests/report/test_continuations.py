"""Texts that a dense and a pruned model go on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.runs.errors import SecateurError


def test_the_likeliest_token_is_written_each_time(
    runs: dict[str, Path], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["ramp"], folder)
    found = secateur.continue_texts(
        folder, checkpoints("llama"), ["the cat", "a dog"], tokens=5, device="cpu"
    )
    saved = json.loads((folder / "secateur" / "continuations.json").read_text())
    assert saved == found.model_dump(mode="json")
    assert [each.prompt for each in found.continuations] == ["the cat", "a dog"]
    for name, source in (("dense", checkpoints("llama")), ("pruned", folder)):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, found.dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
        for each in found.continuations:
            ids = tokenizer(each.prompt, return_tensors="pt")["input_ids"]
            begun = ids.shape[1]
            for _ in range(5):
                with torch.no_grad():
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            new = ids[0, begun:].tolist()
            if tokenizer.eos_token_id in new:
                new = new[: new.index(tokenizer.eos_token_id)]
            assert getattr(each, name) == tokenizer.decode(new)


def test_the_dense_model_is_that_of_the_run(
    runs: dict[str, Path], checkpoints: Callable[..., Path]
) -> None:
    saved = json.loads((runs["ramp"] / "secateur" / "continuations.json").read_text())
    assert saved["reference"] == str(checkpoints("llama"))


def test_what_the_files_lack_is_not_made_up(
    runs: dict[str, Path], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["ramp"], folder)
    weights = folder / "model.safetensors"
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    source = load_file(checkpoints("llama") / "model.safetensors")
    del source["model.layers.1.mlp.up_proj.weight"]
    save_file(source, weights, metadata={"format": "pt"})
    with pytest.raises(SecateurError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        secateur.continue_texts(folder, checkpoints("llama"), ["the cat"], tokens=2)


def test_a_curve_has_no_model(runs: dict[str, Path]) -> None:
    with pytest.raises(SecateurError, match="no model that could write"):
        secateur.continue_texts(runs["sizes"])


def test_an_empty_text_is_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(SecateurError, match="empty prompt"):
        secateur.continue_texts(runs["ramp"], prompts=["the cat", ""])


def test_a_report_without_a_model_needs_a_reference(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"blocks": []}')
    with pytest.raises(SecateurError, match="name it with --reference"):
        secateur.continue_texts(tmp_path)
