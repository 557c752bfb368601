"""How a smaller model is stored: stock sizes, or a class of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.runs.errors import SecateurError
from secateur.shrinking.layout import plan_layout
from secateur.shrinking.source import Source, open_source
from secateur.shrinking.stock import stock_config, uniform_widths
from secateur.shrinking.units import Width, block_parameters, find_sub_blocks
from tiny import make_checkpoint


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama of two groups with four query heads each."""
    folder = tmp_path_factory.mktemp("grouped")
    make_checkpoint("llama", folder, num_attention_heads=8)
    return open_source(folder)


def chosen(source: Source, sparsity: float, **others: Any) -> tuple[list[Width], float]:
    """Widths of the first block, and the share of all blocks that goes beyond what was asked."""
    sub_blocks = find_sub_blocks(source.blocks)
    total = block_parameters(source.blocks)
    whole = {"whole_groups": False, **others}
    widths = uniform_widths(source, sub_blocks, round(sparsity * total), sparsity, **whole)
    removed = sum(each.removed(width) for each, width in zip(sub_blocks, widths, strict=True))
    assert widths == widths[:2] * len(source.blocks)
    return widths[:2], removed / total - sparsity


@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35, 0.5, 0.7])
def test_channels_one_by_one_meet_the_budget_to_a_channel_in_each_block(
    grouped: Source, sparsity: float, whole_groups: bool
) -> None:
    widths, over = chosen(grouped, sparsity, whole_groups=whole_groups, grid=1)
    channel = next(
        each.unit_parameters for each in find_sub_blocks(grouped.blocks) if each.kind == "ffn"
    )
    assert 0 <= over * block_parameters(grouped.blocks) < 3 * (channel + 1)
    assert not whole_groups or widths[0].queries == 4


def test_attention_comes_nearest_to_the_share_that_shall_go(grouped: Source) -> None:
    # A group is a key, a value, and four times a query and its output: ten parts of one size.
    assert chosen(grouped, 0.2, grid=1)[0][0] == Width(2, 3)
    assert chosen(grouped, 0.4, grid=1)[0][0] == Width(2, 2)
    assert chosen(grouped, 0.5, grid=1)[0][0] == Width(1, 4)
    assert chosen(grouped, 0.4, whole_groups=True, grid=1)[0][0] == Width(1, 4)


@pytest.mark.parametrize("grid", [8, 16, 24])
def test_channels_are_a_multiple_of_the_grid(grouped: Source, grid: int) -> None:
    for sparsity in (0.2, 0.35, 0.5):
        (_, feed_forward), over = chosen(grouped, sparsity, grid=grid)
        assert feed_forward.units % grid == 0 or feed_forward.units == 64
        # A channel is 96 of 13,376 / 64 parameters, and so on for all of a step.
        assert 0 <= over < grid * 96 * 3 / block_parameters(grouped.blocks) + 1e-3


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama of one block, which is as wide as those of SmolLM2-135M."""
    folder = tmp_path_factory.mktemp("smol")
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "head_dim": 64, "num_hidden_layers": 1}
    make_checkpoint("llama", folder, **sizes, num_attention_heads=9, num_key_value_heads=3)
    return open_source(folder)


@pytest.mark.parametrize(
    ("sparsity", "attention", "channels"),
    [
        (0.1, (3, 3), 1312), (0.2, (2, 3), 1280), (0.25, (3, 2), 1152), (0.3, (3, 2), 1024),
        (0.4, (2, 2), 960), (0.5, (2, 2), 768), (0.6, (1, 3), 640),
    ],
)  # fmt: skip
def test_the_grid_is_the_largest_that_removes_little_more_than_was_asked(
    smol: Source, sparsity: float, attention: tuple[int, int], channels: int
) -> None:
    widths, over = chosen(smol, sparsity)
    assert widths == [attention, (channels, 0)]
    assert -0.001 <= over <= 0.02


def test_heads_that_do_not_divide_the_hidden_size_are_stored_as_mistral(grouped: Source) -> None:
    sub_blocks = find_sub_blocks(grouped.blocks)
    odd = stock_config(grouped, sub_blocks, {"attention": Width(2, 3), "ffn": Width(64, 0)})
    even = stock_config(grouped, sub_blocks, {"attention": Width(2, 2), "ffn": Width(64, 0)})
    assert odd is not None
    assert even is not None
    assert (odd["model_type"], odd["num_attention_heads"], odd["head_dim"]) == ("mistral", 6, 8)
    assert (even["model_type"], even["num_attention_heads"], even["head_dim"]) == ("llama", 4, 8)


def test_a_share_that_no_stock_widths_reach_is_refused(grouped: Source) -> None:
    with pytest.raises(SecateurError, match="leave out --uniform"):
        chosen(grouped, 0.99)


def test_stock_classes_that_tie_heads_to_the_hidden_width_keep_their_attention(
    tmp_path: Path,
) -> None:
    make_checkpoint("opt", tmp_path)
    widths, _ = chosen(open_source(tmp_path), 0.2)
    assert widths[0] == Width(4, 1)


def test_attention_that_no_stock_class_has_is_kept_whole_or_padded(
    checkpoints: Callable[..., Path],
) -> None:
    source = open_source(checkpoints("gpt2"))
    sub_blocks = find_sub_blocks(source.blocks)
    fewer = [each.whole._replace(units=each.units - 1) for each in sub_blocks]
    with pytest.raises(SecateurError, match="--padded"):
        plan_layout(source, sub_blocks, fewer, "uniform")
    layout = plan_layout(source, sub_blocks, fewer, "padded")
    assert layout.widths == [Width(4, 1), Width(128, 0)] * 3


def test_padding_takes_the_smallest_stock_width_that_holds_all(
    checkpoints: Callable[..., Path],
) -> None:
    source = open_source(checkpoints("qwen3"))
    sub_blocks = find_sub_blocks(source.blocks)
    kept = [Width(1, 1), Width(9, 0), Width(2, 1), Width(7, 0), Width(0, 2), Width(0, 0)]
    assert plan_layout(source, sub_blocks, kept, "padded").widths[1] == Width(12, 0)
    layout = plan_layout(source, sub_blocks, kept, "padded", 1)
    assert layout.widths == [Width(2, 1), Width(9, 0)] * 3
    assert (layout.config["num_attention_heads"], layout.config["num_key_value_heads"]) == (2, 2)


def test_blocks_whose_heads_differ_are_refused(checkpoints: Callable[..., Path]) -> None:
    source = open_source(checkpoints("llama"))
    sub_blocks = find_sub_blocks(source.blocks)
    wider = tuple(
        replace(axis, positions_UP=torch.arange(axis.positions_UP.numel()).view(1, -1))
        for axis in sub_blocks[2].axes
    )
    sub_blocks[2] = replace(sub_blocks[2], axes=wider)
    with pytest.raises(SecateurError, match="different shapes"):
        plan_layout(source, sub_blocks, [each.whole for each in sub_blocks], "uneven")
    with pytest.raises(SecateurError, match="differ in width from the beginning"):
        plan_layout(source, sub_blocks, [each.whole for each in sub_blocks], "uniform")
