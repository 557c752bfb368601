"""Replaying finished parts changes nothing but time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.blocks.inputs import find_groups, steps
from secateur.blocks.replay import Replay
from secateur.blocks.streams import Batches, Stream
from secateur.models.experts import unstacked_experts
from secateur.models.resident import ResidentStore
from secateur.models.structure import find_linears
from secateur.models.text_path import find_blocks
from tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_bit_equal_while_a_block_is_pruned(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    device = torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    store = ResidentStore(find_blocks(model), None, device)
    ids = torch.randint(4, 200, (8, 16), generator=torch.Generator().manual_seed(2))
    stream = Stream(store, ids, Batches.of(8, 16, 32), device, torch.float32, None, 10**9)
    block = store.load(0)
    batches = stream.batches.all
    with unstacked_experts(block):
        groups = find_groups(find_linears(block), lambda: stream.forward(block, batches[0]))
        pruned: set[str] = set()
        with Replay(block) as replay:
            for step in steps(groups):
                for linear in (linear for group in step for linear in group.linears):
                    linear.weight_OI.mul_(torch.rand_like(linear.weight_OI) > 0.5)
                    pruned.add(linear.name)
                replay.finish(pruned)
                for batch in batches * 2:
                    replayed = stream.forward(block, batch, replay)
                    with _undisturbed(block):
                        assert torch.equal(replayed, stream.forward(block, batch))
    assert not any("forward" in vars(module) for module in block.modules())


class _undisturbed:
    """Runs the block's own forwards for a moment."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.block = block

    def __enter__(self) -> None:
        self.taken = [
            (module, vars(module).pop("forward"))
            for module in self.block.modules()
            if "forward" in vars(module)
        ]

    def __exit__(self, *_: object) -> None:
        for module, forward in self.taken:
            module.forward = forward
