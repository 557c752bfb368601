"""Sub-models: cut is masked in every family; their widths and their divergences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.models.text_path import find_blocks
from secateur.runs.errors import SecateurError
from secateur.shrinking import sub_models
from secateur.shrinking.source import open_source
from secateur.shrinking.sub_models import check_cuttable, divergences, draw_widths, masked, narrowed
from secateur.shrinking.units import (
    SubBlock,
    all_units,
    block_parameters,
    find_sub_blocks,
    kept_parameters,
)
from tiny import make_checkpoint

CUTTABLE = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "gpt2",
    "gpt_neox",
]  # fmt: skip
FFN_ONLY = ["olmo2", "falcon", "bloom"]
IDS = torch.arange(4, 36).view(2, 16)


def load(checkpoints: Callable[..., Path], family: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoints(family), dtype=torch.float64
    )
    return model.eval()


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def random_units(sub_blocks: list[SubBlock], seed: int) -> list[Tensor]:
    """Some units of each sub-block, of some none at all and of some all; some lose query heads."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for number, sub_block in enumerate(sub_blocks):
        share = (0.0, 1.0, 0.5, 0.3)[(number + seed) % 4]
        count = round(share * sub_block.units)
        units_K = torch.randperm(sub_block.units, generator=generator)[:count].sort().values
        heads = sub_block.heads_per_unit
        if heads > 1 and count and (number + seed) % 3:
            queries_KR = torch.rand(count, heads, generator=generator).argsort(1)
            units_K = units_K[:, None] * heads + queries_KR[:, 1:].sort(1).values
        kept.append(units_K)
    return kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", CUTTABLE)
def test_cut_is_masked(family: str, seed: int, checkpoints: Callable[..., Path]) -> None:
    model = load(checkpoints, family)
    blocks = find_blocks(model)
    sub_blocks = find_sub_blocks(blocks)
    kept = random_units(sub_blocks, seed)
    with masked(blocks, sub_blocks, kept):
        expected = logits_of(model)
    with narrowed(blocks, sub_blocks, kept):
        actual = logits_of(model)
    assert not torch.allclose(actual, logits_of(model))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", CUTTABLE)
def test_the_model_is_as_before_afterwards(family: str, checkpoints: Callable[..., Path]) -> None:
    model = load(checkpoints, family)
    before, state = logits_of(model), copy.deepcopy(model.state_dict())
    blocks = find_blocks(model)
    sub_blocks = find_sub_blocks(blocks)
    with narrowed(blocks, sub_blocks, random_units(sub_blocks, 1)):
        logits_of(model)
    assert torch.equal(logits_of(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with narrowed(blocks, sub_blocks, all_units(sub_blocks)):
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", CUTTABLE)
def test_a_block_without_units_adds_only_its_biases(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    model = load(checkpoints, family)
    blocks = find_blocks(model)
    sub_blocks = find_sub_blocks(blocks)
    none = [torch.arange(0) for _ in sub_blocks]
    with masked(blocks, sub_blocks, none):
        expected = logits_of(model)
    with narrowed(blocks, sub_blocks, none):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", CUTTABLE)
def test_unit_parameters_are_those_a_cut_takes_away(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    model = load(checkpoints, family)
    blocks = find_blocks(model)
    sub_blocks = find_sub_blocks(blocks)
    kept = random_units(sub_blocks, 3)
    seen: dict[int, int] = {}

    def count(index: int) -> Callable[..., None]:
        def note(*_: object) -> None:
            seen[index] = sum(parameter.numel() for parameter in blocks[index].parameters())

        return note

    with narrowed(blocks, sub_blocks, kept):
        for index, block in enumerate(blocks):
            next(block.children()).register_forward_hook(count(index))
        logits_of(model)
    removed = kept_parameters(sub_blocks, all_units(sub_blocks)) - kept_parameters(sub_blocks, kept)
    assert sum(seen.values()) == block_parameters(blocks) - removed


@pytest.mark.parametrize("family", CUTTABLE)
def test_check_accepts_what_can_be_cut(family: str, checkpoints: Callable[..., Path]) -> None:
    source = open_source(checkpoints(family))
    check_cuttable(source.store(torch.device("cpu")), find_sub_blocks(source.blocks))
    assert all(parameter.is_meta for parameter in source.blocks.model.parameters())


@pytest.mark.parametrize("family", FFN_ONLY)
def test_attention_that_cannot_be_cut_is_refused_with_a_way_out(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    source = open_source(checkpoints(family))
    store = source.store(torch.device("cpu"))
    with pytest.raises(SecateurError, match="--ffn-only"):
        check_cuttable(store, find_sub_blocks(source.blocks))
    check_cuttable(store, find_sub_blocks(source.blocks, ffn_only=True))


def test_query_heads_that_cannot_go_alone_are_refused_with_a_way_out(tmp_path: Path) -> None:
    # Its attention takes the width of its queries from the configuration.
    make_checkpoint("gpt_bigcode", tmp_path)
    source = open_source(tmp_path)
    store, sub_blocks = source.store(torch.device("cpu")), find_sub_blocks(source.blocks)
    assert sub_blocks[0].whole == (1, 4)
    with pytest.raises(SecateurError, match="--whole-groups"):
        check_cuttable(store, sub_blocks)
    check_cuttable(store, sub_blocks, queries=False)


def test_mixtures_are_refused(checkpoints: Callable[..., Path]) -> None:
    blocks = find_blocks(load(checkpoints, "mixtral"))
    with pytest.raises(SecateurError, match="mixtures of experts"):
        find_sub_blocks(blocks)


COSTS = [[0, 10, 20], list(range(0, 65, 4)), [0, 7], [0, 2, 3, 4, 4, 6, 8, 9]]


def draw(seed: int = 0, sparsity: float = 0.3, count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(draw_widths(COSTS, [sparsity] * count, generator))


def test_places_are_in_the_grid_and_few() -> None:
    for cost, place_N in zip(COSTS, draw().unbind(1), strict=True):
        assert set(place_N.tolist()) <= set(range(len(cost)))
        assert len(place_N.unique()) <= 9


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
def test_what_is_left_scatters_around_the_sparsity(sparsity: float) -> None:
    share_N = draw(sparsity=sparsity, count=320)[:, 1] / 16
    present_N = share_N[share_N > 0]
    # A few are gone altogether, the rest is even over its range.
    assert float(share_N.mean()) == pytest.approx((1 - sparsity) * 23 / 24, abs=0.03)
    assert float(present_N.min()) >= 1 - 2 * sparsity - 1 / 16


def test_every_sub_block_is_sometimes_gone_and_independently() -> None:
    gone_NS = draw(count=240, sparsity=0.1) == 0
    assert gone_NS.sum(0).tolist() == [10, 10, 10, 10]
    assert int(gone_NS.all(1).sum()) == 0


def test_a_seed_decides() -> None:
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_divergence_is_that_of_the_logits(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_source(checkpoints("gemma2")).store(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids_WL = torch.randint(4, 260, (2, 7), generator=generator)
    dense_WLD = torch.randn(2, 7, 32, generator=generator)
    broken_WLD = dense_WLD.clone().index_fill(2, torch.tensor([3]), torch.nan)
    states_NWLD = torch.stack([dense_WLD, -dense_WLD, broken_WLD])

    def found() -> list[float]:
        with store.head():
            return divergences(
                store.blocks, ids_WL, dense_WLD, states_NWLD, torch.device("cpu"), torch.float32
            )

    whole = found()
    monkeypatch.setattr(sub_models, "LOGITS", 3 * 260)
    assert found() == pytest.approx(whole, rel=1e-5, abs=1e-7)
    same, other, broken = whole
    assert same == pytest.approx(0, abs=1e-6)
    assert other > 0.01
    assert broken == float("inf")
