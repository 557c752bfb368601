"""The pass over the dense blocks that tries sub-models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.blocks.streams import Batches, Stream
from secateur.models.text_path import find_blocks
from secateur.shrinking.source import Source, open_source
from secateur.shrinking.sub_models import narrowed
from secateur.shrinking.survey import Survey, survey
from secateur.shrinking.units import Width, find_sub_blocks
from secateur.shrinking.widths import width_grids

TOKENS = torch.randint(4, 260, (8, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def run(
    source: Source, widths: Sequence[Sequence[Width]], batch_tokens: int = 64, first: int = 6
) -> Survey:
    store = source.store(CPU)
    sub_blocks = find_sub_blocks(source.blocks)
    grids = width_grids(sub_blocks, 16)
    places = [[grid.index(w) for grid, w in zip(grids, row, strict=True)] for row in widths]
    stream = Stream(
        store, TOKENS, Batches.of(8, 16, batch_tokens), CPU, torch.float32, None, 10**9, {2}
    )
    windows = slice(first, first + 2)
    return survey(store, sub_blocks, grids, places, TOKENS, windows, stream, 10**9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_sub_models_without_whole_sub_blocks_are_the_narrowed_model(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    source = open_source(checkpoints(family))
    whole = [each.whole for each in find_sub_blocks(source.blocks)]
    gone = [
        width._replace(units=0) if place in (1, 2, 4) else width
        for place, width in enumerate(whole)
    ]
    found = run(source, [whole, gone])
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    blocks = find_blocks(model)
    kept = [torch.arange(width.units) for width in gone]
    with torch.no_grad():
        dense = model(TOKENS[6:]).logits.log_softmax(-1)
        with narrowed(blocks, find_sub_blocks(blocks), kept):
            pruned = model(TOKENS[6:]).logits.log_softmax(-1)
    expected = float((dense.exp() * (dense - pruned)).sum(-1).mean())
    assert found.divergences[0] == pytest.approx(0, abs=1e-6)
    assert found.divergences[1] == pytest.approx(expected, rel=1e-4)
    assert found.tokens == TOKENS.numel() + 2 * 32
    assert all(parameter.is_meta for block in source.blocks for parameter in block.parameters())


def test_wider_is_better_locally_and_batches_do_not_matter(
    checkpoints: Callable[..., Path],
) -> None:
    source = open_source(checkpoints("qwen2"))
    widths = [
        [Width(1, 2), Width(32, 0)] * 3,
        [Width(2, 1), Width(16, 0)] * 3,
        [Width(0, 2), Width(48, 0)] * 3,
    ]
    found, single = run(source, widths), run(source, widths, batch_tokens=16)
    for losses in found.losses:
        assert losses[0] == max(losses)
        assert losses[-1] == 0 < min(losses[:-1])
    for none, least, fewer_groups, fewer_queries, _ in found.losses[::2]:
        assert none > least > max(fewer_groups, fewer_queries)
    assert single.divergences == pytest.approx(found.divergences, rel=1e-3)
    for one, other in zip(single.losses, found.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("queries", [Width(2, 2), Width(2, 1)])
def test_refitted_sub_models_are_closer_to_what_they_were_fitted_to(
    queries: Width, checkpoints: Callable[..., Path]
) -> None:
    source = open_source(checkpoints("llama"))
    half = [queries, Width(32, 0)] * 3
    (found,) = run(source, [half], first=0).divergences
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).eval()
    blocks = find_blocks(model)
    with torch.no_grad():
        dense = model(TOKENS[:2]).logits.log_softmax(-1)
        sub_blocks = find_sub_blocks(blocks)
        kept = [each.first(width) for each, width in zip(sub_blocks, half, strict=True)]
        with narrowed(blocks, sub_blocks, kept):
            plain = model(TOKENS[:2]).logits.log_softmax(-1)
    assert found < float((dense.exp() * (dense - plain)).sum(-1).mean())
