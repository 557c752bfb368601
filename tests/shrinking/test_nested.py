"""The default preset, from a checkpoint to a smaller one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.report.documents.shrink import ShrinkReport
from secateur.runs.errors import SecateurError
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import shrink
from secateur.shrinking.source import open_source
from secateur.shrinking.units import find_sub_blocks
from tiny import make_checkpoint

IDS = torch.arange(4, 36).unsqueeze(0)


def options(text_file: Path, **values: Any) -> ShrinkOptions:
    return ShrinkOptions.from_mapping(
        {
            "sparsity": 0.4,
            "sub_models": 24,
            "dtype": "float32",
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
            **values,
        }
    )


@pytest.fixture(scope="module")
def shrunk(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("shrunk") / "model"
    shrink(checkpoints("qwen3"), output, options(text_file))
    return output


def report_of(folder: Path) -> ShrinkReport:
    return ShrinkReport.model_validate_json((folder / "report.json").read_text())


def test_the_target_is_met_to_one_step_of_the_grid(
    shrunk: Path, checkpoints: Callable[..., Path]
) -> None:
    report = report_of(shrunk)
    sub_blocks = find_sub_blocks(open_source(checkpoints("qwen3")).blocks)
    steps = {"attention": 1, "ffn": 4}
    coarsest = max(steps[each.kind] * each.unit_parameters for each in sub_blocks)
    counted = report.parameters
    over = counted.blocks_before - counted.blocks_after - 0.4 * counted.blocks_before
    assert 0 <= over < coarsest
    assert all(each.kept % steps[each.kind] == 0 for each in report.sub_blocks)


def test_the_report_says_why(shrunk: Path) -> None:
    report = report_of(shrunk)
    assert report.survey is not None
    assert (report.survey.sub_models, report.survey.tokens) == (24, 2 * 32)
    assert any(each.next_penalty is not None for each in report.sub_blocks)
    total = 0.0
    for each in report.sub_blocks:
        assert each.penalty is not None
        assert each.local_loss is not None
        whole = (each.kept, each.queries) == (each.of, each.queries_of)
        assert (each.local_loss == 0) == whole
        # Nothing is known of widths narrower than any that was tried.
        assert each.next_penalty is None or each.next_penalty >= each.penalty
        total += each.penalty
    assert report.survey.predicted_divergence == pytest.approx(total)
    assert report.forward_tokens == 8 * 32 + 24 * 64 + 3 * 8 * 32
    assert report.rounds == []


def test_refitted_weights_are_in_the_files_and_the_model_runs(shrunk: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shrunk, trust_remote_code=True)
    text = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    plain = model.generate(
        IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(text, plain)
    assert not (shrunk / "secateur" / "refitted").exists()


def test_an_interrupted_run_ends_with_the_same_bytes(
    shrunk: Path, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    for phase, last in (("Trying widths", 2), ("Cutting blocks", 2)):

        def stop(name: str, done: int, total: int, phase: str = phase, last: int = last) -> None:
            if (name, done) == (phase, last):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            shrink(checkpoints("qwen3"), tmp_path, options(text_file), progress=stop)
    assert not list(tmp_path.glob("*.json"))
    result = shrink(checkpoints("qwen3"), tmp_path, options(text_file))
    assert result.report.resumed == 2
    for path in shrunk.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    assert result.report.sub_blocks == report_of(shrunk).sub_blocks


def test_batches_do_not_matter(
    shrunk: Path,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    single = shrink(checkpoints("qwen3"), tmp_path, options(text_file, batch_tokens=32)).report
    for one, other in zip(single.sub_blocks, report_of(shrunk).sub_blocks, strict=True):
        assert one.kept == other.kept
        assert one.held_out_error == pytest.approx(other.held_out_error, rel=1e-2)


def test_the_order_of_units_and_of_query_heads_in_the_dense_model_does_not_matter(
    text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "dense"
    make_checkpoint("llama", source, num_attention_heads=8)
    generator = torch.Generator().manual_seed(0)
    permuted = tmp_path / "permuted"
    permuted.mkdir()
    for path in source.iterdir():
        (permuted / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    moved = {}
    sub_blocks = find_sub_blocks(open_source(source).blocks)
    for sub_block in sub_blocks:
        order_U = torch.randperm(sub_block.units, generator=generator)
        order_UR = torch.rand(*sub_block.whole, generator=generator).argsort(1)
        moved[sub_block.label] = order_U, order_UR
        for axis in sub_block.axes:
            name = f"model.layers.{sub_block.block}.{axis.parameter}"
            heads = sub_block.heads_per_unit * axis.head_positions
            heads_UP, rest_UP = axis.positions_UP[order_U].split(
                [heads, axis.positions_UP.shape[1] - heads], dim=1
            )
            if heads:
                heads_URH = heads_UP.unflatten(1, (sub_block.heads_per_unit, -1))
                heads_UP = heads_URH[torch.arange(sub_block.units)[:, None], order_UR].flatten(1)
            taken = torch.cat([heads_UP, rest_UP], dim=1).flatten()
            tensors[name] = tensors[name].index_copy(
                axis.axis,
                axis.positions_UP.flatten(),
                tensors[name].index_select(axis.axis, taken),
            )
    save_file(tensors, permuted / "model.safetensors", metadata={"format": "pt"})
    shrink(source, tmp_path / "one", options(text_file))
    shrink(permuted, tmp_path / "other", options(text_file))
    kept, other = (
        load_file(tmp_path / name / "secateur" / "kept.safetensors") for name in ("one", "other")
    )
    for label, (order_U, order_UR) in moved.items():
        units = other[label]
        if units.ndim == 2:
            groups, heads = units // 4, units % 4
            found = order_U[groups] * 4 + order_UR[groups, heads]
            rows = found.sort(1).values
            assert torch.equal(rows[rows[:, 0].argsort()], kept[label])
        else:
            assert torch.equal(order_U[units].sort().values, kept[label])
    assert any(units.ndim == 2 for units in kept.values())


def test_query_heads_go_in_the_same_number_from_every_group(
    text_file: Path, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path / "dense", num_attention_heads=8)
    report = shrink(tmp_path / "dense", tmp_path / "out", options(text_file)).report
    kept = load_file(tmp_path / "out" / "secateur" / "kept.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    attentions = [each for each in report.sub_blocks if each.kind == "attention"]
    assert any(each.kept and each.queries in (1, 2, 3) for each in attentions)
    for each in attentions:
        assert each.queries is not None
        sizes = config[str(each.block)]
        assert sizes["num_key_value_heads"] == each.kept
        assert sizes["num_attention_heads"] == each.kept * each.queries
        # A group is 2 · 8 · 32 parameters and as many more for each of its query heads.
        assert each.parameters == each.kept * (1 + each.queries) * 512
        heads = kept[f"{each.block}.attention"]
        whole = each.queries == each.queries_of
        assert heads.shape == ((each.kept,) if whole else (each.kept, each.queries))
        if not whole:
            assert torch.equal(heads // 4, (heads // 4)[:, :1].expand_as(heads))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    plain = model.generate(
        IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(text, plain)


def test_whole_groups_keep_all_their_query_heads(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = shrink(checkpoints("qwen3"), tmp_path, options(text_file, whole_groups=True)).report
    assert all(each.queries == each.queries_of for each in report.sub_blocks)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_uniform_widths_need_no_sub_models(
    family: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = shrink(checkpoints(family), tmp_path, options(text_file, form="uniform")).report
    assert report.survey is None
    for kind in ("attention", "ffn"):
        assert len({each.kept for each in report.sub_blocks if each.kind == kind}) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert model(IDS).logits.isfinite().all()


def test_uniform_feed_forwards_keep_a_multiple_of_the_grid(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    chosen = options(text_file, form="uniform", grid=16)
    report = shrink(checkpoints("llama"), tmp_path, chosen).report
    assert {each.kept for each in report.sub_blocks if each.kind == "ffn"} == {32}
    assert 0.4 <= report.parameters.removed < 0.5


def test_nearly_everything_can_go(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = shrink(checkpoints("llama"), tmp_path, options(text_file, sparsity=0.95)).report
    assert any(each.kept == 0 for each in report.sub_blocks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.generate(IDS, max_new_tokens=4, min_new_tokens=4).shape == (1, 36)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": 64}, "smaller --grid"),
        ({"sub_models": 2}, "sub_models"),
        ({"sub_models": 10**9}, "sub_models .* less than or equal to 10000"),
        ({"masks": 10}, "belongs to the preset paper"),
        ({"preset": "paper", "grid": 8}, "belongs to the preset default"),
        ({"preset": "paper", "whole_groups": True}, "belongs to the preset default"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_work(
    values: dict[str, Any],
    message: str,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    plain = {"sparsity": 0.4, "calibration": {"source": str(text_file)}}
    with pytest.raises(SecateurError, match=message):
        shrink(
            checkpoints("llama"),
            tmp_path / "out",
            ShrinkOptions.from_mapping({**plain, **values}),
        )
    assert not (tmp_path / "out").exists()
