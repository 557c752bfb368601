"""The pass over the dense blocks that tries sub-models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.architecture import find_blocks
from secateur.structured.masking import narrowed
from secateur.structured.source import Source, open_source
from secateur.structured.survey import Survey, Trials, survey
from secateur.structured.units import find_sub_blocks
from secateur.structured.widths import width_grids
from secateur.walk.streams import Batches, Stream

TOKENS = torch.randint(4, 260, (8, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def run(
    source: Source, widths: Sequence[Sequence[int]], batch_tokens: int = 64, first: int = 6
) -> Survey:
    store = source.store(CPU)
    sub_blocks = find_sub_blocks(source.blocks)
    stream = Stream(
        store, TOKENS, Batches.of(8, 16, batch_tokens), CPU, torch.float32, None, 10**9, {2}
    )
    return survey(
        store,
        sub_blocks,
        width_grids(sub_blocks, 16),
        TOKENS,
        stream,
        Trials(widths, slice(first, first + 2), 10**9),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_sub_models_without_whole_sub_blocks_are_the_narrowed_model(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    source = open_source(checkpoints(family))
    units = [each.units for each in find_sub_blocks(source.blocks)]
    gone = [0 if place in (1, 2, 4) else count for place, count in enumerate(units)]
    found = run(source, [units, gone])
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    blocks = find_blocks(model)
    kept = [torch.arange(count) for count in gone]
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
    widths = [[1, 32] * 3, [2, 16] * 3, [0, 48] * 3]
    found, single = run(source, widths), run(source, widths, batch_tokens=16)
    for losses in found.losses:
        assert losses[0] == max(losses)
        assert losses[-1] == 0 < min(losses[:-1])
    assert single.divergences == pytest.approx(found.divergences, rel=1e-3)
    for one, other in zip(single.losses, found.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_refitted_sub_models_are_closer_to_what_they_were_fitted_to(
    checkpoints: Callable[..., Path],
) -> None:
    source = open_source(checkpoints("llama"))
    units = [each.units for each in find_sub_blocks(source.blocks)]
    half = [count if count == 2 else 32 for count in units]
    (found,) = run(source, [half], first=0).divergences
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).eval()
    blocks = find_blocks(model)
    with torch.no_grad():
        dense = model(TOKENS[:2]).logits.log_softmax(-1)
        with narrowed(blocks, find_sub_blocks(blocks), [torch.arange(n) for n in half]):
            plain = model(TOKENS[:2]).logits.log_softmax(-1)
    assert found < float((dense.exp() * (dense - plain)).sum(-1).mean())
