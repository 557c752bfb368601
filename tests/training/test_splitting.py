"""Weights under a dual variable, against z and u written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secateur.models.structure import Linear, find_blocks
from secateur.patterns.pattern import Unstructured
from secateur.runs.errors import SecateurError
from secateur.training.holding import Whole
from secateur.training.masked_linear import MaskedLinear
from secateur.training.masks import RowBudget
from secateur.training.optimiser import MaskedAdamW
from secateur.training.options import Training
from secateur.training.splitting import Splitting
from secateur.training.start import masked_linears
from secateur.training.trainer import Trainer

BETAS, EPSILON = (0.9, 0.95), 1e-8


def test_seven_steps_match_scalar_arithmetic() -> None:
    torch.manual_seed(0)
    rate, penalty, kept = 1e-2, 0.3, 5
    module = nn.Linear(4, 3, bias=False).double()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, :2] = True
    mask[0, 1] = False
    linear = MaskedLinear(
        "l",
        Linear("l", module, transposed=False),
        RowBudget.of_mask(Unstructured(7 / 12), mask),
        mask,
    )
    adam = MaskedAdamW({"l": linear.weight}, {}, betas=BETAS, epsilon=EPSILON, weight_decay=0.0)
    splitting = Splitting([linear], penalty)

    w = module.weight.detach().flatten().tolist()
    z = [value * bool(keep) for value, keep in zip(w, mask.flatten(), strict=True)]
    u, m, v = [0.0] * 12, [0.0] * 12, [0.0] * 12
    for step in range(1, 8):
        gradient = torch.randn(3, 4).double()
        linear.weight.grad = gradient.clone()
        splitting.pull()
        adam.step(rate, decay=0.0)
        for i, g in enumerate(gradient.flatten().tolist()):
            g += penalty * (w[i] - z[i] + u[i])
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            root = math.sqrt(v[i] / (1 - BETAS[1] ** step)) + EPSILON
            w[i] -= rate / (1 - BETAS[0] ** step) * m[i] / root
        if step % 3 == 0:
            splitting.advance()
            score = (splitting.sums["l"].abs() * adam.second["l"].sqrt()).flatten()
            linear.mask.view(-1).zero_()[score.topk(kept).indices] = True
            wanted = [abs(w[i] + u[i]) * math.sqrt(v[i]) for i in range(12)]
            largest = sorted(range(12), key=lambda i: -wanted[i])[:kept]
            z = [w[i] + u[i] if i in largest else 0.0 for i in range(12)]
            u = [u[i] + w[i] - z[i] for i in range(12)]
            assert any(u)
        both = splitting.sums["l"]
        assert (both * linear.mask).flatten().tolist() == pytest.approx(z, rel=1e-12)
        assert (both * ~linear.mask).flatten().tolist() == pytest.approx(u, rel=1e-12)
        assert linear.weight.flatten().tolist() == pytest.approx(w, rel=1e-10)


@pytest.fixture
def make(checkpoints: Callable[..., Path]) -> Callable[..., Trainer]:
    def trainer(family: str = "llama", **values: Any) -> Trainer:
        options = Training.from_mapping(
            {
                "tokens": 8 * 64,
                "length": 16,
                "batch_tokens": 64,
                "pattern": "0.6",
                "admm": {"penalty": 0.1},
                "decay": {"strength": 0.0, "place": "outside"},
                "optimiser": {"learning_rate": 2e-3, "second_moment": "gradient"},
                "distillation": {"weight": 0.0},
                **values,
                "masks": {
                    "scope": "global",
                    "score": "sensitivity",
                    "refresh_steps": 2,
                    **values.pop("masks", {}),
                },
            },
            "ast",
        )
        generator = torch.Generator().manual_seed(0)
        windows_WL = torch.randint(4, 260, (32, 16), generator=generator, dtype=torch.int32)
        blocks = find_blocks(AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval())
        linears = masked_linears(blocks, {}, options)
        return Trainer(Whole(blocks, linears), None, windows_WL, options, torch.float32)

    return trainer


def projected(s: dict[str, Tensor], v: dict[str, Tensor], zeros: int) -> dict[str, Tensor]:
    """The values that count most by |s|·√v in all tensors together."""
    scores = {name: s[name].abs() * v[name].sqrt() for name in s}
    limit = torch.cat([score.flatten() for score in scores.values()]).sort().values[zeros]
    return {name: s[name] * (scores[name] >= limit) for name in s}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_follows_the_two_variables(make: Callable[..., Trainer], family: str) -> None:
    trainer = make(family)
    splitting = trainer.splitting
    assert splitting is not None
    gradients: list[dict[str, Tensor]] = []
    pull = splitting.pull

    def recorded() -> None:
        gradients.append({each.name: each.weight.grad.double() for each in trainer.linears})
        pull()

    splitting.pull = recorded  # type: ignore[method-assign]
    weights = {each.name: each.weight for each in trainer.linears}
    w = {name: weight.detach().double() for name, weight in weights.items()}
    z = {each.name: w[each.name] * each.mask for each in trainer.linears}
    u, m, v = ({name: torch.zeros_like(t) for name, t in w.items()} for _ in range(3))
    zeros = sum(int((~each.mask).sum()) for each in trainer.linears)
    for step in range(1, 9):
        trainer.step()
        rate = trainer.figures()[0].learning_rate
        for name, gradient in gradients.pop().items():
            g = gradient + 0.1 * (w[name] - z[name] + u[name])
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g.square()
            root = (v[name] / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            moved = rate / (1 - BETAS[0] ** step) * m[name] / root
            w[name] = w[name] * (1 - rate * 0.1) - moved
        if step in (2, 4, 6):
            s = {name: w[name] + u[name] for name in w}
            z = projected(s, v, zeros)
            u = {name: s[name] - z[name] for name in w}
        for each in trainer.linears:
            both = splitting.sums[each.name].double()
            torch.testing.assert_close(both * each.mask, z[each.name], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(both * ~each.mask, u[each.name], rtol=1e-4, atol=1e-6)
    trainer.remove()
    for name, expected in projected(w, v, zeros).items():
        torch.testing.assert_close(weights[name].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "masks"),
    [
        ("0.6", {}),
        ("0.6", {"scope": "row", "score": "magnitude"}),
        ("2:4", {"scope": "row"}),
        ("0.6", {"frozen_share": 0.5}),
    ],
)
def test_counts_are_exact_at_the_end(
    pattern: str, masks: dict[str, Any], make: Callable[..., Trainer]
) -> None:
    trainer = make(pattern=pattern, masks=masks)
    zeros = sum(int((~each.mask).sum()) for each in trainer.linears)
    for step in range(8):
        assert (trainer.splitting is None) == (step > 4 and "frozen_share" in masks)
        trainer.step()
    rates = [figures.flip_rate for figures in trainer.figures()]
    assert any(rates)
    before = [each.weight.detach().clone() for each in trainer.linears]
    # All weights are there until they are projected, and what is kept is as it was.
    assert all(bool(weight.all()) for weight in before) == ("frozen_share" not in masks)
    trainer.remove()
    for each, weight in zip(trainer.linears, before, strict=True):
        assert torch.equal(each.weight.detach(), weight * each.mask)
        if pattern == "2:4":
            assert bool((each.mask.view(-1, 4).sum(1) == 2).all())
    assert sum(int((each.weight == 0).sum()) for each in trainer.linears) == zeros
    assert trainer.splitting is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"masks": {"frozen_share": 1.0}}, "frozen share of 1 keeps the one that is there"),
        ({"decay": {"strength": 0.1}}, "give decay.strength 0"),
        ({"low_rank": {"group": 8}}, "a low-rank boost stands in"),
        ({"admm": {"penalty": 0.0}}, "admm.penalty"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    given = {"tokens": 10**6, "pattern": "0.9", "admm": {}, "decay": {"strength": 0.0}, **values}
    with pytest.raises(SecateurError, match=message):
        Training.from_mapping(given, "ast")
