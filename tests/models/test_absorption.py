"""Which columns can be reordered: a contract by family, and proof instead of trust."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secateur.blocks.inputs import find_groups
from secateur.models.absorption import Absorption, find_absorptions
from secateur.models.capture import capture
from secateur.models.experts import unstacked_experts
from secateur.models.structure import Linear, find_linears
from secateur.models.text_path import find_blocks
from tiny import FAMILIES

IDS = torch.arange(4, 36).unsqueeze(0)

_LLAMA = {
    "self_attn.o_proj": (["self_attn.v_proj"], (2, 2, 8)),
    "mlp.down_proj": (["mlp.gate_proj", "mlp.up_proj"], (1, 1, 64)),
}
_EXPERT = "mlp.experts.experts"
_BLOOM = {
    "self_attention.dense": (["self_attention.query_key_value"], (4, 1, 8)),
    "mlp.dense_4h_to_h": (["mlp.dense_h_to_4h"], (1, 1, 128)),
}

# Reader: its writers, and (orders, slices, channels) of its columns. Four query heads of 8.
CONTRACT: dict[str, dict[str, tuple[list[str], tuple[int, int, int]]]] = {
    **dict.fromkeys("llama mistral qwen2 qwen3 gemma2 gemma3_text olmo2".split(), _LLAMA),
    "phi3": {
        "self_attn.o_proj": (["self_attn.qkv_proj"], (2, 2, 8)),
        "mlp.down_proj": (["mlp.gate_up_proj"], (1, 1, 64)),
    },
    "opt": {
        "self_attn.out_proj": (["self_attn.v_proj"], (4, 1, 8)),
        "fc2": (["fc1"], (1, 1, 64)),
    },
    "gpt2": {
        "attn.c_proj": (["attn.c_attn"], (4, 1, 8)),
        "mlp.c_proj": (["mlp.c_fc"], (1, 1, 128)),
    },
    "gpt_neox": {
        "attention.dense": (["attention.query_key_value"], (4, 1, 8)),
        "mlp.dense_4h_to_h": (["mlp.dense_h_to_4h"], (1, 1, 64)),
    },
    # One key and one value for all queries.
    "gpt_bigcode": {
        "attn.c_proj": (["attn.c_attn"], (1, 4, 8)),
        "mlp.c_proj": (["mlp.c_fc"], (1, 1, 128)),
    },
    "bloom": _BLOOM,
    # One key and one value for all queries.
    "falcon": {**_BLOOM, "self_attention.dense": (["self_attention.query_key_value"], (1, 4, 8))},
    "mixtral": {
        "self_attn.o_proj": (["self_attn.v_proj"], (2, 2, 8)),
        **{
            f"{_EXPERT}.{i}.down_proj": ([f"{_EXPERT}.{i}.gate_up_proj"], (1, 1, 64))
            for i in range(4)
        },
    },
    "qwen2_moe": {
        "self_attn.o_proj": (["self_attn.v_proj"], (2, 2, 8)),
        "mlp.shared_expert.down_proj": (
            ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
            (1, 1, 32),
        ),
        **{
            f"{_EXPERT}.{i}.down_proj": ([f"{_EXPERT}.{i}.gate_up_proj"], (1, 1, 32))
            for i in range(4)
        },
    },
}


@contextmanager
def dense_blocks(
    folder: Path, ids: Tensor = IDS
) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, Callable[[], Tensor]]]]]:
    """A tiny model, and its blocks with what runs each of them."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # Random biases: those of a fresh model are zero and would hide a mistake.
        if "bias" in name:
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    blocks = find_blocks(model)
    captured = capture(blocks, ids)
    runs = [
        (block, lambda block=block, call=call: call(block, captured.first_BLD))
        for block, call in zip(blocks, captured.calls, strict=True)
    ]
    yield model, runs  # type: ignore[misc]


def absorptions_of(block: nn.Module, run: Callable[[], Tensor]) -> list[Absorption]:
    groups: list[tuple[Linear, ...]] = [
        group.linears for group in find_groups(find_linears(block), run)
    ]
    return find_absorptions(block, groups, run)


def reorder_at_random(absorption: Absorption, seed: int) -> None:
    orders, _, channels = absorption.columns_BSC.shape
    draws = torch.rand(orders, channels, generator=torch.Generator().manual_seed(seed))
    absorption.reorder(draws.argsort(1))


def test_every_family_has_its_contract() -> None:
    assert CONTRACT.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_absorb_what_they_can_and_logits_stay(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    with dense_blocks(checkpoints(family)) as (model, blocks):
        logits = model(IDS).logits
        for index, (block, run) in enumerate(blocks):
            with unstacked_experts(block):
                dense = [parameter.clone() for parameter in block.parameters()]
                found = absorptions_of(block, run)
                # Looking for them leaves the block bit for bit as it was.
                assert all(map(torch.equal, dense, block.parameters()))
                assert {
                    each.reader.name: (
                        [writer.linear.name for writer in each.writers],
                        tuple(each.columns_BSC.shape),
                    )
                    for each in found
                } == CONTRACT[family]
                for absorption in found:
                    before = absorption.reader.weight_OI.clone()
                    reorder_at_random(absorption, index)
                    assert not torch.equal(absorption.reader.weight_OI, before)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_arranged_as_the_columns_move(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    with dense_blocks(checkpoints(family)) as (_, blocks):
        for absorption in absorptions_of(*blocks[0]):
            before = absorption.split(absorption.reader.weight_OI.clone())
            orders, _, channels = absorption.columns_BSC.shape
            order_BC = torch.rand(orders, channels).argsort(1)
            absorption.reorder(order_BC)
            after = absorption.split(absorption.reader.weight_OI)
            expected = before.gather(2, order_BC[:, None].expand(before.shape))
            assert torch.equal(after, expected)


@pytest.mark.parametrize(
    ("changed", "left"),
    [("self_attn.v_proj", "mlp.down_proj"), ("mlp.up_proj", "self_attn.o_proj")],
)
def test_channels_that_something_tells_apart_are_left_alone(
    changed: str, left: str, checkpoints: Callable[..., Path]
) -> None:
    with dense_blocks(checkpoints("llama")) as (_, blocks):
        block, run = blocks[0]

        def gain(_module: nn.Module, _inputs: object, y_BLD: Tensor) -> Tensor:
            return y_BLD * torch.linspace(0.5, 2, y_BLD.shape[-1])

        block.get_submodule(changed).register_forward_hook(gain)
        assert [each.reader.name for each in absorptions_of(block, run)] == [left]


def test_channels_that_are_used_elsewhere_are_left_alone(checkpoints: Callable[..., Path]) -> None:
    with dense_blocks(checkpoints("llama")) as (_, blocks):
        block, run = blocks[0]
        seen: list[Tensor] = []
        up = block.get_submodule("mlp.up_proj")
        up.register_forward_hook(lambda _module, _inputs, y_BLD: seen.append(y_BLD))

        def with_first_channels() -> Tensor:
            y_BLD = run()
            return y_BLD + seen[-1][..., : y_BLD.shape[-1]]

        found = absorptions_of(block, with_first_channels)
        assert [each.reader.name for each in found] == ["self_attn.o_proj"]


def test_an_expert_that_did_not_run_proves_nothing(checkpoints: Callable[..., Path]) -> None:
    # Two of four experts are chosen for the only token.
    with dense_blocks(checkpoints("mixtral"), IDS[:, :1]) as (_, blocks):
        block, run = blocks[0]
        with unstacked_experts(block):
            found = absorptions_of(block, run)
        names = [each.reader.name for each in found]
        assert names[0] == "self_attn.o_proj"
        assert len(names) == 1 + 2
