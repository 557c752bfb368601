from __future__ import annotations

import hashlib
import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.scores import score_windows
from secateur.evaluation.text import split_windows
from secateur.report.documents.evaluation import Evaluation
from secateur.runs.errors import SecateurError
from tiny import make_tokenizer


@pytest.fixture
def dense_folder(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("llama")


def test_numbers_and_their_protocol(
    pruned_folder: Path, pruned: PreTrainedModel, text_file: Path
) -> None:
    result = evaluate(pruned_folder, text=text_file, window=32, max_windows=9, dtype="float32")
    content = text_file.read_text()
    tokens_N = torch.tensor(make_tokenizer().encode(content, add_special_tokens=False))
    windows_WL = split_windows(tokens_N, 32, 9)
    expected = math.exp(score_windows(pruned, windows_WL, dtype=torch.float32).loss_W.mean())
    assert result.model.perplexity == pytest.approx(expected)
    assert result.model.loss == pytest.approx(math.log(expected))
    words = len(content.split())
    assert result.model.word_perplexity == pytest.approx(expected ** (len(tokens_N) / words))
    assert result.model.interval is not None
    assert result.model.interval[0] < expected < result.model.interval[1]
    assert (result.dense, result.divergence, result.notes) == (None, None, [])
    protocol = result.protocol.model_dump()
    assert protocol == {
        "text": "text.txt",
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "text_tokens": len(tokens_N),
        "text_words": words,
        "tokenizer": str(pruned_folder),
        "bos": "none",
        "window": 32,
        "windows": 9,
        "predicted_tokens": 279,
        "forward_dtype": "float32",
        "device": "cpu",
    }


def test_against_the_dense_model(
    pruned_folder: Path, dense_folder: Path, dense: PreTrainedModel, text_file: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    result = evaluate(
        pruned_folder,
        text=text_file,
        window=32,
        max_windows=4,
        against=dense_folder,
        dtype="float32",
        progress=lambda *call: calls.append(call),
    )
    alone = evaluate(dense_folder, text=text_file, window=32, max_windows=4, dtype="float32")
    assert result.dense is not None and result.divergence is not None
    assert result.dense.perplexity == pytest.approx(alone.model.perplexity)
    assert result.divergence.kl > 0
    assert 0 <= result.divergence.top1_agreement < 1
    assert calls[-1] == ("Evaluating", 4, 4)


def test_intervals_come_from_resampled_windows(
    pruned_folder: Path,
    pruned: PreTrainedModel,
    dense_folder: Path,
    dense: PreTrainedModel,
    text_file: Path,
) -> None:
    settings = {"text": text_file, "window": 32, "max_windows": 12, "dtype": "float32"}
    result = evaluate(pruned_folder, against=dense_folder, **settings)
    tokens_N = torch.tensor(make_tokenizer().encode(text_file.read_text()))
    scores = score_windows(pruned, split_windows(tokens_N, 32, 12), dense=dense)
    assert scores.comparison is not None
    drawn_RW = torch.randint(12, (10_000, 12), generator=torch.Generator().manual_seed(0))
    model_R = scores.loss_W[drawn_RW].mean(1)
    dense_R = scores.comparison.dense_loss_W[drawn_RW].mean(1)
    kl_R = scores.comparison.divergence_W[drawn_RW].mean(1)

    def middle(statistic_R: torch.Tensor) -> list[float]:
        return [float(statistic_R.quantile(q)) for q in (0.025, 0.975)]

    assert result.model is not None and result.dense is not None
    assert result.divergence is not None and result.difference is not None
    assert result.model.interval == pytest.approx(middle(model_R.exp()))
    assert result.dense.interval == pytest.approx(middle(dense_R.exp()))
    assert result.divergence.kl_interval == pytest.approx(middle(kl_R))
    assert result.difference.loss == pytest.approx(result.dense.loss - result.model.loss)
    assert result.difference.loss_interval == pytest.approx(middle(dense_R - model_R))
    paired = middle(dense_R.exp() - model_R.exp())
    assert result.difference.perplexity_interval == pytest.approx(paired)


def test_few_windows_have_no_intervals(
    pruned_folder: Path, dense_folder: Path, text_file: Path
) -> None:
    settings = {"text": text_file, "window": 32, "against": dense_folder}
    few = evaluate(pruned_folder, max_windows=7, **settings)
    assert few.model is not None and few.divergence is not None and few.difference is not None
    assert few.model.interval is few.divergence.kl_interval is few.difference.loss_interval is None
    assert few.notes == ["7 windows are too few for 95 % intervals; evaluate 8 or more."]
    enough = evaluate(pruned_folder, max_windows=8, **settings)
    assert enough.model is not None and enough.model.interval is not None
    assert enough.notes == []


def test_in_memory_is_as_on_disk(
    pruned_folder: Path,
    pruned: PreTrainedModel,
    dense_folder: Path,
    dense: PreTrainedModel,
    text_file: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    settings = {"text": text_file, "window": 32, "max_windows": 4}
    on_disk = evaluate(pruned_folder, against=dense_folder, **settings)
    in_memory = evaluate(pruned, against=dense, tokenizer=tokenizer, **settings)
    mixed = evaluate(pruned_folder, against=dense, **settings)
    assert in_memory.model.loss == on_disk.model.loss == mixed.model.loss
    assert in_memory.divergence == on_disk.divergence == mixed.divergence


def test_bos_in_front_of_every_window(pruned_folder: Path, text_file: Path) -> None:
    settings = {"text": text_file, "window": 32, "max_windows": 4}
    without = evaluate(pruned_folder, **settings)
    result = evaluate(pruned_folder, bos="window", **settings)
    assert result.protocol.bos == "window"
    assert result.protocol.predicted_tokens == 4 * 31
    assert result.model.loss != without.model.loss


def test_weights_keep_their_dtype_unless_float32_is_asked_for(
    checkpoints: Callable[..., Path], text_file: Path
) -> None:
    folder = checkpoints("llama", torch.bfloat16)
    settings = {"text": text_file, "window": 32, "max_windows": 1}
    narrow = evaluate(folder, dtype="bfloat16", **settings)
    assert (narrow.model.weights_dtype, narrow.protocol.forward_dtype) == ("bfloat16",) * 2
    wide = evaluate(folder, dtype="float32", **settings)
    assert (wide.model.weights_dtype, wide.protocol.forward_dtype) == ("float32",) * 2
    assert wide.model.loss == pytest.approx(narrow.model.loss, rel=0.02)
    assert wide.model.interval is None


def test_the_schema_is_stable(pruned_folder: Path, dense_folder: Path, text_file: Path) -> None:
    result = evaluate(pruned_folder, text=text_file, window=32, max_windows=2, against=dense_folder)
    plain = json.loads(json.dumps(result.model_dump(mode="json"), allow_nan=False))
    assert plain["schema_version"] == 1
    assert set(plain) == {
        "schema_version",
        "model",
        "dense",
        "divergence",
        "difference",
        "protocol",
        "zero_shot",
        "seconds",
        "notes",
    }
    figures = {"model", "weights_dtype", "loss", "perplexity", "interval", "word_perplexity"}
    assert set(plain["model"]) == set(plain["dense"]) == figures
    assert set(plain["divergence"]) == {"kl", "kl_interval", "top1_agreement"}
    paired = {"loss", "loss_interval", "perplexity", "perplexity_interval"}
    assert set(plain["difference"]) == paired
    assert Evaluation.model_validate(plain) == result


def test_local_files_need_no_network(
    pruned_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    evaluate(pruned_folder, text=text_file, window=32, max_windows=1)


def test_text_without_spaces_has_no_word_perplexity(pruned_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("鳥" * 400)
    result = evaluate(pruned_folder, text=path, window=32, max_windows=2)
    assert result.model.word_perplexity is None


def test_calibration_text_among_the_evaluation_text_is_noted(
    pruned_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    leaky = tmp_path / "leaky"
    shutil.copytree(pruned_folder, leaky)
    (leaky / "secateur").mkdir()
    tokens = torch.tensor([make_tokenizer().encode(text_file.read_text()[:500])])
    save_file({"tokens": tokens}, leaky / "secateur" / "calibration.safetensors")
    (note,) = evaluate(leaky, text=text_file, window=32, max_windows=8).notes
    assert "13-word spans of the calibration text occur in the evaluation text" in note


def test_a_text_or_a_dataset(pruned_folder: Path, text_file: Path) -> None:
    with pytest.raises(SecateurError, match="either a text file or a data set, or else tasks"):
        evaluate(pruned_folder)
    with pytest.raises(SecateurError, match="either a text file or a data set"):
        evaluate(pruned_folder, text=text_file, dataset="wikitext2")


def test_text_shorter_than_a_window(pruned_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(SecateurError, match="has 5 tokens and one window needs 32"):
        evaluate(pruned_folder, text=tmp_path / "text.txt", window=32)


def test_windows_longer_than_the_positions(pruned_folder: Path, text_file: Path) -> None:
    with pytest.raises(SecateurError, match="of 65 tokens are longer than the 64 positions of"):
        evaluate(pruned_folder, text=text_file, window=65)


def test_a_model_in_memory_needs_a_tokenizer(pruned: PreTrainedModel, text_file: Path) -> None:
    with pytest.raises(SecateurError, match="needs its tokenizer"):
        evaluate(pruned, text=text_file, window=32)


def test_a_tokenizer_of_another_model(pruned: PreTrainedModel, text_file: Path) -> None:
    large = make_tokenizer()
    large.add_tokens(["the", "cat"])
    with pytest.raises(
        SecateurError, match=r"the token 'cat' of number 261, .* embedding has 260 rows"
    ):
        evaluate(pruned, text=text_file, window=32, tokenizer=large)


def test_different_tokenizers_cannot_be_compared(
    pruned_folder: Path, dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense_folder, other)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(other)
    with pytest.raises(SecateurError, match="have different tokenizers"):
        evaluate(pruned_folder, text=text_file, window=32, against=other)


def test_different_vocabularies_cannot_be_compared(
    pruned: PreTrainedModel,
    small_vocabulary: PreTrainedModel,
    text_file: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(SecateurError, match="has a vocabulary of 100 tokens and the evaluated"):
        evaluate(pruned, text=text_file, window=32, against=small_vocabulary, tokenizer=tokenizer)


def test_a_tokenizer_without_bos(
    pruned: PreTrainedModel, text_file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(SecateurError, match="no beginning-of-text token"):
        evaluate(pruned, text=text_file, window=32, bos="window", tokenizer=bare)


def test_a_missing_model(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="nothing-here"):
        evaluate(tmp_path / "nothing-here", text=text_file)


def test_a_truncated_checkpoint(pruned_folder: Path, text_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pruned_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SecateurError, match="is truncated or no safetensors file"):
        evaluate(broken, text=text_file, window=32)


def test_a_missing_tensor(pruned_folder: Path, text_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pruned_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SecateurError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        evaluate(broken, text=text_file, window=32)


def test_files_outside_the_folder_are_not_read(
    dense: PreTrainedModel, text_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    dense.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    moved = min(listed["weight_map"].values())
    (folder / moved).rename(tmp_path / moved)
    listed["weight_map"] = {
        name: f"../{file}" if file == moved else file for name, file in listed["weight_map"].items()
    }
    index.write_text(json.dumps(listed))
    with pytest.raises(SecateurError, match="outside its own folder"):
        evaluate(folder, text=text_file, window=32)
