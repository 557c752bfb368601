"""The same widths in all blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.runs.errors import SecateurError
from secateur.shrinking.source import Source, open_source
from secateur.shrinking.stock import Widths, stock_config
from secateur.shrinking.uniform import uniform_widths
from secateur.shrinking.units import Width, block_parameters, find_sub_blocks
from tiny import make_checkpoint


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama of two groups with four query heads each."""
    folder = tmp_path_factory.mktemp("grouped")
    make_checkpoint("llama", folder, num_attention_heads=8)
    return open_source(folder)


def chosen(source: Source, sparsity: float, *, whole_groups: bool = False) -> tuple[Widths, int]:
    """Widths, and how much of the budget they leave."""
    sub_blocks = find_sub_blocks(source.blocks)
    budget = round(sparsity * block_parameters(source.blocks))
    widths = uniform_widths(source, sub_blocks, budget, sparsity, whole_groups=whole_groups)
    removed = sum(
        each.parameters(each.whole) - each.parameters(widths.of(each)) for each in sub_blocks
    )
    return widths, budget - removed


@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35, 0.5, 0.7])
def test_the_budget_is_met_to_a_channel_in_each_block(
    grouped: Source, sparsity: float, whole_groups: bool
) -> None:
    widths, left = chosen(grouped, sparsity, whole_groups=whole_groups)
    channel = next(
        each.unit_parameters for each in find_sub_blocks(grouped.blocks) if each.kind == "ffn"
    )
    assert 0 <= left < 3 * (channel + 1)
    assert widths.attention is not None
    assert not whole_groups or widths.attention.queries == 4


def test_attention_comes_nearest_to_the_share_that_shall_go(grouped: Source) -> None:
    # A group is a key, a value, and four times a query and its output: ten parts of one size.
    assert chosen(grouped, 0.2)[0].attention == Width(2, 3)
    assert chosen(grouped, 0.4)[0].attention == Width(2, 2)
    assert chosen(grouped, 0.5)[0].attention == Width(1, 4)
    assert chosen(grouped, 0.4, whole_groups=True)[0].attention == Width(1, 4)


def test_heads_that_do_not_divide_the_hidden_size_are_stored_as_mistral(grouped: Source) -> None:
    sub_blocks = find_sub_blocks(grouped.blocks)
    odd = stock_config(grouped, sub_blocks, Widths(Width(2, 3), 64))
    even = stock_config(grouped, sub_blocks, Widths(Width(2, 2), 64))
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
    assert widths.attention == Width(4, 1)
