"""Streamed passes over the dense model against the whole model with autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from secateur.allocation.dense_model import DenseModel
from secateur.models.checkpoint import Checkpoint
from secateur.models.experts import unstacked_experts
from secateur.models.resident import ResidentStore
from secateur.models.store import BlockStore
from secateur.models.structure import find_linears
from secateur.models.text_path import find_blocks
from secateur.solvers.scores import wanda_score
from tiny import FAMILIES

CPU = torch.device("cpu")


def make_store(folder: Path) -> BlockStore:
    return Checkpoint.at(folder).store(CPU)


def tokens(count: int = 8, length: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, 200, (count, length), generator=generator)


def dense_model(store: BlockStore, batch_tokens: int = 80, memory: int = 10**9) -> DenseModel:
    return DenseModel(
        store,
        tokens()[:6],
        CPU,
        torch.float32,
        batch_tokens=batch_tokens,
        seed=0,
        folder=None,
        memory=memory,
    )


def reference(folder: Path, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Root of the summed squared output gradients, and mean squared inputs, of all linears."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    blocks = find_blocks(model)
    squares: dict[str, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.setdefault(name, []).append(args[0].detach().flatten(0, -2))

            def add(gradient: Tensor) -> None:
                square_O = gradient.flatten(0, -2).double().square().sum(0)
                squares[name] = squares.get(name, torch.zeros_like(square_O)) + square_O

            output.register_hook(add)

        return seen

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(unstacked_experts(block))
            for linear in find_linears(block):
                linear.module.register_forward_hook(hook(f"{blocks.name(index)}.{linear.name}"))
        logits = model(ids).logits
        cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).backward()
    means = {name: torch.cat(seen).square().mean(0) for name, seen in inputs.items()}
    return {name: square.sqrt() for name, square in squares.items()}, means


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_loss_gradient_equals_autograd_of_the_whole_model(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints(family)
    store = make_store(folder)
    # A batch of four sequences and one of two.
    expected, means = reference(folder, tokens()[:6])
    seen = []
    for block in dense_model(store).blocks_under_loss(sequences=16):
        seen.append(block.index)
        scale = max(float(expected[name].max()) for name in expected if block.name in name)
        for linear in block.linears:
            name = f"{block.name}.{linear.name}"
            if name not in expected:
                assert block.inputs[linear.name].tokens == 0
                continue
            torch.testing.assert_close(
                block.sensitivity_O[linear.name].double(),
                expected[name],
                rtol=1e-3,
                atol=1e-4 * scale,
            )
            torch.testing.assert_close(
                block.inputs[linear.name].mean_square_I, means[name], rtol=1e-3, atol=1e-5
            )
    assert seen == [2, 1, 0]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_scores_are_wanda_times_sensitivity_and_idle_experts_have_none(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints(family)
    _, means = reference(folder, tokens()[[0, 3]])
    for block in dense_model(make_store(folder)).blocks(sequences=2, probes=2):
        scores = dict(block.scores())
        for linear in block.linears:
            name = f"{block.name}.{linear.name}"
            assert (linear.name in scores) == (name in means)
            if name in means:
                wanda_OI = wanda_score(linear.weight_OI, means[name])
                expected_OI = wanda_OI * block.sensitivity_O[linear.name][:, None]
                torch.testing.assert_close(scores[linear.name], expected_OI, rtol=1e-3, atol=1e-6)


def test_probes_estimate_the_squared_jacobian_of_the_normalised_output(
    checkpoints: Callable[..., Path],
) -> None:
    folder = checkpoints("llama")
    found: dict[str, Tensor] = {}
    for block in dense_model(make_store(folder)).blocks(sequences=1, probes=300):
        if block.index == 1:
            found = {name: root.square() / 300 for name, root in block.sensitivity_O.items()}

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    block_1 = model.model.layers[1]
    outputs: dict[str, Tensor] = {}
    for linear in find_linears(block_1):
        linear.module.register_forward_hook(
            lambda _m, _a, output, name=linear.name: outputs.__setitem__(name, output)
        )
    block_1.register_forward_hook(lambda _m, _a, y: outputs.__setitem__("y", y))
    model(tokens()[:1])
    names = [name for name in outputs if name != "y"]
    exact = {name: torch.zeros(outputs[name].shape[-1]) for name in names}
    y_BLD = outputs["y"]
    for component in (y_BLD / y_BLD.detach().norm(dim=-1, keepdim=True)).flatten():
        gradients = torch.autograd.grad(
            component, [outputs[name] for name in names], retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                exact[name] += gradient[0].square().sum(0)
    for name in names:
        torch.testing.assert_close(found[name].sum(), exact[name].sum(), rtol=0.1, atol=0)
        torch.testing.assert_close(found[name], exact[name], rtol=0.6, atol=1e-4)


def test_batches_and_mapped_files_change_nothing(checkpoints: Callable[..., Path]) -> None:
    store = make_store(checkpoints("llama"))
    first, second = (
        {
            f"{block.name}.{name}": root
            for block in dense_model(store, batch_tokens, memory).blocks_under_loss(5)
            for name, root in block.sensitivity_O.items()
        }
        for batch_tokens, memory in [(1000, 10**9), (20, 0)]
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_a_model_in_memory_is_left_as_it_was(checkpoints: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints("llama", torch.bfloat16), dtype=torch.bfloat16
    ).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = ResidentStore(find_blocks(model), None, CPU)
    for _ in dense_model(store).blocks_under_loss(2):
        pass
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_streaming_leaves_no_weights_behind(checkpoints: Callable[..., Path]) -> None:
    for family in ("llama", "qwen2"):
        store = make_store(checkpoints(family))
        for _ in dense_model(store).blocks_under_loss(2):
            pass
        assert all(parameter.is_meta for parameter in store.blocks.model.parameters())
