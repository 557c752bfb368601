"""From a checkpoint to a smaller one, and back to it after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.models.text_path import find_blocks
from secateur.runs.errors import SecateurError
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import shrink
from secateur.shrinking.source import open_source
from secateur.shrinking.sub_models import masked
from secateur.shrinking.units import find_sub_blocks

IDS = torch.arange(4, 36).unsqueeze(0)


def options(text_file: Path, **values: Any) -> ShrinkOptions:
    return ShrinkOptions.from_mapping(
        {
            "preset": "paper",
            "step": 0.2,
            "masks": 6,
            "dtype": "float32",
            "calibration": {"source": str(text_file), "samples": 4, "length": 16},
            **values,
        }
    )


def smallest_unit(folder: Path) -> float:
    """Share of the blocks' parameters in the smallest unit."""
    source = open_source(folder)
    total = sum(parameter.numel() for block in source.blocks for parameter in block.parameters())
    return min(each.unit_parameters for each in find_sub_blocks(source.blocks)) / total


@pytest.fixture(scope="module")
def shrunk(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("shrunk") / "model"
    shrink(checkpoints("qwen3"), output, options(text_file))
    return output


def test_half_is_half_to_less_than_a_unit(shrunk: Path, checkpoints: Callable[..., Path]) -> None:
    report = json.loads((shrunk / "report.json").read_text())
    removed = report["parameters"]["removed"]
    assert 0 <= 0.5 - removed < smallest_unit(checkpoints("qwen3"))
    assert len(report["rounds"]) == 3
    assert report["rounds"][-1]["share"] == removed
    assert report["forward_tokens"] == 3 * 7 * 4 * 16
    for sub_block in report["sub_blocks"]:
        assert sub_block["of"] - sub_block["kept"] == sum(sub_block["removed_by_round"])
        for count, value in zip(
            sub_block["removed_by_round"], sub_block["coefficients"], strict=True
        ):
            assert (value is None) == (count == 0)


def test_saved_model_is_the_masked_one(shrunk: Path, checkpoints: Callable[..., Path]) -> None:
    small = AutoModelForCausalLM.from_pretrained(shrunk, trust_remote_code=True).eval()
    dense = AutoModelForCausalLM.from_pretrained(checkpoints("qwen3")).eval()
    blocks = find_blocks(dense)
    sub_blocks = find_sub_blocks(blocks)
    beside = load_file(shrunk / "secateur" / "kept.safetensors")
    kept = [beside[sub_block.label] for sub_block in sub_blocks]
    with torch.no_grad(), masked(blocks, sub_blocks, kept):
        expected = dense(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_ends_with_the_same_bytes(
    shrunk: Path, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "Round 3":
            raise KeyboardInterrupt

    output = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        shrink(checkpoints("qwen3"), output, options(text_file), progress=stop)
    assert not list(output.glob("*.json"))
    with pytest.raises(SecateurError, match="another options masks"):
        shrink(checkpoints("qwen3"), output, options(text_file, masks=8))
    result = shrink(checkpoints("qwen3"), output, options(text_file))
    assert result.report.resumed == 2
    for path in shrunk.glob("*.safetensors"):
        assert path.read_bytes() == (output / path.name).read_bytes()
    again = shrink(checkpoints("qwen3"), output, options(text_file))
    assert again.report == result.report


def test_calibration_windows_are_fresh_in_every_round(shrunk: Path) -> None:
    tokens_SL = load_file(shrunk / "secateur" / "calibration.safetensors")["tokens"]
    assert tokens_SL.shape == (12, 16)
    first, second, third = tokens_SL.split(4)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("form", ["uniform", "padded"])
def test_stock_forms_load_with_stock_classes(
    form: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    shrink(checkpoints("llama"), tmp_path / "out", options(text_file, form=form))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    if form == "uniform":
        kept = {kind: {s["kept"] for s in report["sub_blocks"] if s["kind"] == kind}
                for kind in ("attention", "ffn")}  # fmt: skip
        assert kept == {"attention": {1}, "ffn": {28}}
    else:
        assert "zeros" in report["notes"][0]


def test_feed_forwards_alone(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = checkpoints("olmo2")
    with pytest.raises(SecateurError, match="--ffn-only"):
        shrink(source, tmp_path / "out", options(text_file))
    assert not (tmp_path / "out").exists()
    chosen = options(text_file, ffn_only=True, sparsity=0.3, form="uniform")
    result = shrink(source, tmp_path / "out", chosen)
    assert {each.kind for each in result.report.sub_blocks} == {"ffn"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_attention_heads == 4


def test_nearly_everything_can_go(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    result = shrink(checkpoints("llama"), tmp_path, options(text_file, sparsity=0.98, step=0.5))
    parameters = result.report.parameters
    left_over = 0.98 * parameters.blocks_before - (
        parameters.blocks_before - parameters.blocks_after
    )
    present = [each.parameters / each.kept for each in result.report.sub_blocks if each.kept]
    assert 0 <= left_over < min(present)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.generate(IDS, max_new_tokens=4, min_new_tokens=4).shape == (1, 36)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 0.999}, "would empty the model"),
        ({"sparsity": 0.8, "ffn_only": True}, "feed-forwards hold"),
        ({"sparsity": 1e-6}, "less than the smallest unit"),
        ({"sparsity": 0.97, "form": "uniform"}, "leave out --uniform"),
        ({"skip": ["*.nothing"]}, "--skip .*nothing matches none"),
        ({"only": "*.down_proj"}, "leave whole every attention and feed-forward"),
        ({"skip": ["*.o_proj", "*.up_proj"]}, "leave whole every attention and feed-forward"),
        ({"skip": "*.up_proj", "ffn_only": True}, "leave whole every"),
        ({"skip": "*.up_proj", "sparsity": 0.4}, "all that --only and --skip leave.* or less"),
        ({"skip": "*.0.*up_proj", "form": "uniform"}, "the feed-forward whole in some blocks"),
        ({"skip": "*.up_proj", "form": "uniform", "sparsity": 0.25}, "can lose 16.5%.*leave out"),
        ({"calibration": {"source": "self", "length": 65}}, "64 positions"),
    ],
)
def test_goals_that_cannot_be_reached_are_refused_before_work(
    values: dict[str, Any],
    message: str,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SecateurError, match=message):
        shrink(checkpoints("llama"), tmp_path / "out", options(text_file, **values))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"sparsity": 0.0},
        {"sparsity": 1.0},
        {"masks": 1},
        {"masks": 10**9},
        {"step": 0.0},
        {"prior": "x"},
    ],
)
def test_options_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(SecateurError, match=next(iter(values))):
        ShrinkOptions.from_mapping({"preset": "paper", **values})


def test_the_result_can_be_evaluated_and_pruned_like_any_checkpoint(
    shrunk: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = secateur.Recipe.from_mapping(
        {"calibration": {"source": str(text_file), "samples": 4, "length": 16}}
    )
    with pytest.raises(SecateurError, match="--trust-remote-code"):
        secateur.prune(shrunk, recipe, tmp_path / "out")
    result = secateur.prune(shrunk, recipe, tmp_path / "out", trust_remote_code=True)
    assert result.report.streamed
    assert result.report.sparsity.counted == pytest.approx(0.5, abs=1e-3)


def kept_whole(folder: Path) -> dict[str, bool]:
    report = json.loads((folder / "report.json").read_text())
    return {
        f"{each['block']}.{each['kind']}": (each["kept"], each["queries"])
        == (each["of"], each["queries_of"])
        for each in report["sub_blocks"]
    }


@pytest.mark.parametrize("form", ["uneven", "padded"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_patterns_name_stays_whole(
    preset: str, form: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source, output = checkpoints("llama"), tmp_path / "out"
    calibration = {"source": str(text_file), "samples": 4, "length": 32}
    own = {"step": 0.2, "masks": 6} if preset == "paper" else {"sub_models": 24}
    values = {"preset": preset, "form": form, "sparsity": 0.3, "dtype": "float32", **own}
    patterns = {"only": "*.layers.*", "skip": ["*.0.self_attn.k_proj", "*.1.mlp.*"]}
    chosen = ShrinkOptions.from_mapping({**values, **patterns, "calibration": calibration})
    report = shrink(source, output, chosen).report
    whole = kept_whole(output)
    assert whole["0.attention"]
    assert whole["1.ffn"]
    assert not whole["0.ffn"]
    # Some grid steps may be too much, but the share is one of all blocks.
    assert 0.3 - smallest_unit(source) < report.parameters.removed < 0.35
    dense, small = load_file(source / "model.safetensors"), {}
    for path in output.glob("*.safetensors"):
        small |= load_file(path)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        torch.testing.assert_close(small[name], dense[name], rtol=0, atol=0)
    loaded = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize(("pattern", "left"), [("*.o_proj", "attention"), ("*.up_proj", "ffn")])
def test_uniform_widths_may_leave_out_one_kind(
    pattern: str, left: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    chosen = options(text_file, form="uniform", skip=pattern, sparsity=0.1)
    shrink(checkpoints("llama"), tmp_path / "out", chosen)
    for label, whole in kept_whole(tmp_path / "out").items():
        assert whole == label.endswith(left)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")


def test_attention_that_cannot_be_cut_may_be_skipped(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    chosen = options(text_file, skip="*.self_attn.*", sparsity=0.3)
    shrink(checkpoints("olmo2"), tmp_path / "out", chosen)
    assert kept_whole(tmp_path / "out")["0.attention"]
