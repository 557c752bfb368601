"""Streams against the model's own forward pass, and blocks in memory for their turn alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.blocks.inputs import InputAccumulator, find_groups, steps, visit_inputs
from secateur.blocks.streams import Batches, Stream, allocate, loaded_blocks
from secateur.models.checkpoint import Checkpoint
from secateur.models.experts import unstacked_experts
from secateur.models.resident import ResidentStore
from secateur.models.streamed import StreamedStore
from secateur.models.structure import find_linears
from secateur.models.text_path import find_blocks
from tiny import FAMILIES

CPU = torch.device("cpu")


def make_stream(folder: Path, batch_tokens: int = 64) -> tuple[ResidentStore, Stream, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    store = ResidentStore(find_blocks(model), None, CPU)
    ids = torch.randint(4, 200, (8, 24), generator=torch.Generator().manual_seed(1))
    batches = Batches.of(*ids.shape, batch_tokens)
    return store, Stream(store, ids, batches, CPU, torch.float32, None, 10**9), ids


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_equals_the_models_own_forward(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    store, stream, ids = make_stream(checkpoints(family))
    model = store.blocks.model
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for index in range(len(store.blocks)):
        torch.testing.assert_close(stream.x_SLD, hidden[index], rtol=1e-4, atol=1e-5)
        block = store.load(index)
        with unstacked_experts(block):
            for batch in stream.batches.all:
                stream.advance(block, batch)
        stream.position += 1


def test_held_out_sequences_share_no_batch_with_fitted_ones() -> None:
    for sequences, length, tokens in [(128, 512, 4096), (10, 32, 100), (4, 64, 1)]:
        batches = Batches.of(sequences, length, tokens)
        covered = [i for batch in batches.all for i in range(sequences)[batch]]
        assert covered == list(range(sequences))
        boundary = batches.held_out[0].start
        assert boundary == sequences * 3 // 4
        assert all(batch.stop <= boundary for batch in batches.fitted)


def test_as_many_sequences_are_fitted_as_is_said() -> None:
    batches = Batches.of(10, 32, 100, fitted=9)
    assert batches.boundary == 9
    assert batches.held_out == batches.judged == [slice(9, 10)]


def test_no_more_is_judged_on_than_decides() -> None:
    few, many = Batches.of(12, 64, 128), Batches.of(128, 512, 1024)
    assert few.judged == few.held_out
    assert many.judged == many.held_out[:4]


def test_a_twin_carries_what_is_fitted_or_judged_and_nothing_else(
    checkpoints: Callable[..., Path],
) -> None:
    _, stream, _ = make_stream(checkpoints("llama"))
    stream.batches = Batches(stream.batches.fitted, [slice(6, 7), slice(7, 8)], [slice(6, 7)])
    twin = stream.twin(None, 10**9)
    assert twin.batches.all == [*stream.batches.fitted, slice(6, 7)]
    assert torch.equal(twin.x_SLD, stream.x_SLD[:7])
    twin.x_SLD.zero_()
    assert stream.x_SLD[:7].any()


@pytest.mark.parametrize("needs", ["norms", "gram"])
def test_statistics_do_not_depend_on_the_batch_size(
    needs: str, checkpoints: Callable[..., Path]
) -> None:
    results = []
    for batch_tokens in (24, 72, 1000):
        store, stream, _ = make_stream(checkpoints("llama"), batch_tokens)
        block = store.load(0)
        first = stream.batches.fitted[0]
        groups = find_groups(find_linears(block), partial(stream.forward, block, first))
        sums = [
            InputAccumulator(group.linears[0].weight_OI.shape[1], needs, CPU, torch.float32)
            for group in groups
        ]
        for batch in stream.batches.fitted:
            visit_inputs(
                groups,
                partial(stream.forward, block, batch),
                lambda index, x, sums=sums: sums[index].add(x),
            )
        results.append([each.result() for each in sums])
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert left.tokens == right.tokens == 6 * 24
            torch.testing.assert_close(left.mean_square_I, right.mean_square_I, rtol=1e-5, atol=0)
            if needs == "gram":
                torch.testing.assert_close(left.gram_II, right.gram_II, rtol=1e-4, atol=1e-6)


def test_gram_matrix_is_that_of_the_inputs_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(500, 24, generator=generator) * torch.logspace(-2, 2, 24)
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)]:
        total = InputAccumulator(24, "gram", CPU, dtype)
        for part in x_NI.split(130):
            total.add(part)
        result = total.result()
        expected = x_NI.double().T @ x_NI.double() / 500
        assert result.gram_II is not None
        scale = expected.diagonal().sqrt()
        error = (result.gram_II.double() - expected) / (scale[:, None] * scale)
        assert error.abs().max() < tolerance
        torch.testing.assert_close(
            result.mean_square_I.double(), expected.diagonal(), rtol=tolerance, atol=0
        )


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
        ),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
    ],
)
def test_linears_are_grouped_by_the_tensor_they_receive(
    family: str, expected: list[set[str]], checkpoints: Callable[..., Path]
) -> None:
    store, stream, _ = make_stream(checkpoints(family))
    block = store.load(0)
    groups = find_groups(
        find_linears(block), lambda: stream.forward(block, stream.batches.held_out[0])
    )
    names = [{linear.name.rpartition(".")[2] for linear in group.linears} for group in groups]
    assert names == expected


def test_sibling_experts_are_one_step(checkpoints: Callable[..., Path]) -> None:
    store, stream, _ = make_stream(checkpoints("mixtral"))
    block = store.load(0)
    with unstacked_experts(block):
        groups = find_groups(
            find_linears(block), lambda: stream.forward(block, stream.batches.held_out[0])
        )
        sizes = [len(step) for step in steps(groups)]
    assert sizes == [1, 1, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_activations_equal_those_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    mapped = allocate((4, 8, 16), tmp_path, budget=0, dtype=dtype)
    assert not list(tmp_path.iterdir()), "nothing is left behind by a killed run"
    x = torch.randn(4, 8, 16).to(dtype)
    mapped.copy_(x)
    assert torch.equal(mapped, x)
    assert allocate((4, 8, 16), tmp_path, budget=10**6).shape == (4, 8, 16)


def in_memory(store: StreamedStore) -> list[int]:
    return [
        index
        for index, block in enumerate(store.blocks)
        if not all(parameter.is_meta for parameter in block.parameters())
    ]


@pytest.fixture
def store(checkpoints: Callable[..., Path]) -> StreamedStore:
    return Checkpoint.open(checkpoints("llama")).store(CPU)


def test_each_block_is_loaded_for_its_turn(store: StreamedStore) -> None:
    seen = []
    for index, name, block in loaded_blocks(store):
        assert block is store.blocks[index]
        assert name == store.blocks.name(index)
        assert in_memory(store) == [index]
        seen.append(index)
    assert seen == [0, 1, 2]
    assert [index for index, *_ in loaded_blocks(store, [2, 0])] == [2, 0]
    assert in_memory(store) == []


def test_a_block_is_released_when_its_turn_ends_early(store: StreamedStore) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in loaded_blocks(store):
            _ = 1 / 0
    assert in_memory(store) == []
    for _ in loaded_blocks(store):
        break
    assert in_memory(store) == []
