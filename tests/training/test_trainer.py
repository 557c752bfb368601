"""Steps: gradients whatever the batches, masks at their time, zeros that stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.models.text_path import find_blocks
from secateur.runs.errors import SecateurError
from secateur.training.holding import Holding
from secateur.training.options import Training
from secateur.training.start import masked_linears, named_linears
from secateur.training.teacher import ResidentTeacher
from secateur.training.trainer import Trainer

Make = Callable[..., Trainer]


@pytest.fixture
def make(checkpoints: Callable[..., Path]) -> Make:
    def trainer(
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        pruned: bool = False,
        **values: Any,
    ) -> Trainer:
        options = Training.from_mapping(
            {
                "tokens": 6 * 64,
                "length": 16,
                "batch_tokens": 64,
                "optimiser": {"learning_rate": 1e-2},
                "masks": {"refresh_steps": 2},
                **values,
            },
            "ast",
        )
        folder = checkpoints(family)
        generator = torch.Generator().manual_seed(0)
        windows_WL = torch.randint(4, 260, (24, 16), generator=generator, dtype=torch.int32)
        dense, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
        blocks = find_blocks(model)
        if pruned:
            for linear in named_linears(blocks).values():
                linear.weight_OI.unflatten(1, (-1, 4))[:, :, 1:3] = 0
        teacher = ResidentTeacher(
            Holding(find_blocks(dense)), windows_WL, options.distillation.temperature
        )
        linears = masked_linears(blocks, {}, options)
        return Trainer(Holding(blocks, linears), teacher, windows_WL, options, dtype)

    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.data.clone() for name, p in trainer.parameters.items()}


def masks(trainer: Trainer) -> list[torch.Tensor]:
    return [each.mask.clone() for each in trainer.linears]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_step_does_not_depend_on_how_its_windows_are_batched(make: Make, family: str) -> None:
    whole, split = make(family, micro_batch_tokens=64), make(family, micro_batch_tokens=16)
    for trainer in (whole, split):
        trainer.step()
    for name, gradient in whole.optimiser.first.items():
        torch.testing.assert_close(gradient, split.optimiser.first[name], rtol=1e-3, atol=1e-5)
    (first,), (same,) = whole.figures(), split.figures()
    assert first.cross_entropy == pytest.approx(same.cross_entropy, rel=1e-5)
    assert first.divergence == pytest.approx(same.divergence, rel=1e-5)
    assert first.gradient_norm == pytest.approx(same.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_gives_the_same_steps(make: Make, family: str) -> None:
    plain, recomputing = make(family), make(family, activation_checkpointing=True)
    seen: list[list[torch.Tensor]] = []
    block = recomputing.holding.blocks[0]
    block.register_forward_pre_hook(lambda *_: seen.append(masks(recomputing)))
    first = recomputing.linears[0].linear.module
    passes: list[int] = []
    first.register_forward_hook(lambda *_: passes.append(recomputing.done))
    for _ in range(3):
        before = masks(recomputing)
        count = len(passes)
        plain.step()
        recomputing.step()
        # Each of the step's passes ran this block twice, with the masks that the step began with.
        assert len(passes) - count == 2 * len(seen)
        assert all(torch.equal(a, b) for each in seen for a, b in zip(each, before, strict=True))
        seen.clear()
    for name, weight in weights(plain).items():
        assert torch.equal(weight, recomputing.parameters[name])
    assert plain.figures() == recomputing.figures()
    assert "forward" not in vars(block)


def test_bfloat16_products_give_the_gradients_of_float32(make: Make) -> None:
    exact, rounded = make(micro_batch_tokens=32), make(micro_batch_tokens=32, dtype=torch.bfloat16)
    for trainer in (exact, rounded):
        trainer.step()
    for name, gradient in exact.optimiser.first.items():
        other = rounded.optimiser.first[name]
        assert other.dtype == torch.float32
        assert float((gradient - other).norm() / gradient.norm()) < 0.1, name


def test_masks_change_at_their_time_and_not_after_the_freeze(make: Make) -> None:
    trainer = make(masks={"refresh_steps": 2, "frozen_share": 0.5})
    changed = []
    for _ in range(6):
        before = masks(trainer)
        trainer.step()
        after = masks(trainer)
        changed.append(not all(map(torch.equal, before, after)))
    assert changed == [False, True, False, False, False, False]
    rates = [figures.flip_rate for figures in trainer.figures()]
    assert [rate is not None for rate in rates] == changed
    for each in trainer.linears:
        assert bool((each.mask.view(-1, 4).sum(1) == 2).all())
        assert torch.equal(each.weight.data != 0, each.mask)


def test_removed_weights_learn_until_the_freeze(make: Make) -> None:
    trainer = make(decay={"strength": 0.0}, optimiser={"learning_rate": 1e-2, "weight_decay": 0.0})
    before = weights(trainer)
    trainer.step()
    for each in trainer.linears:
        moved = each.weight.data != before[f"{each.name}.weight"]
        assert bool(moved[~each.mask].any())


def test_vectors_alone_leave_matrices_as_they_are(make: Make) -> None:
    trainer = make(train="vectors", masks={"frozen_share": 1.0}, pruned=True)
    assert all(parameter.ndim == 1 for parameter in trainer.parameters.values())
    before = [each.weight.data.clone() for each in trainer.linears]
    trainer.step()
    for each, weight in zip(trainer.linears, before, strict=True):
        assert torch.equal(each.weight.data, weight * each.mask)


def test_loss_that_is_not_finite_names_its_step(make: Make) -> None:
    trainer = make()
    trainer.step()
    trainer.model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(SecateurError, match="NaN or infinite at step 2;"):
        trainer.step()


def test_loss_that_is_not_finite_shows_between_refreshes(make: Make) -> None:
    trainer = make(masks={"refresh_steps": 5})
    trainer.model.get_input_embeddings().weight.data.fill_(torch.nan)
    trainer.step()
    trainer.step()
    with pytest.raises(SecateurError, match="NaN or infinite at step 1;"):
        trainer.figures()


def test_dense_forward_until_the_freeze(make: Make) -> None:
    values = {"masks": {"forward": "dense", "refresh_steps": 2, "frozen_share": 0.5}}
    trainer = make(**values, distillation={"temperature": 1.0})
    masked = make(masks={"refresh_steps": 2, "frozen_share": 0.5})
    for each in (trainer, masked):
        each.step()
    (dense,), (pruned,) = trainer.figures(), masked.figures()
    # Nothing is removed yet, so the student is the teacher.
    assert dense.divergence == pytest.approx(0, abs=1e-4)
    assert pruned.divergence > 0.01
    for _ in range(5):
        trainer.step()
    for each in trainer.linears:
        assert torch.equal(each.weight.data != 0, each.mask)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_keep_their_norm_when_masks_freeze(make: Make, family: str) -> None:
    trainer = make(family, masks={"rescale": True, "frozen_share": 0.5})
    each = trainer.linears[0]
    norm_O = each.in_rows(each.weight.data).norm(dim=1)
    each.remove(rescale=True)
    torch.testing.assert_close(each.in_rows(each.weight.data).norm(dim=1), norm_O)
    each.weight.data.zero_()
    each.remove(rescale=True)
    assert not bool(each.weight.data.any())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_global_scope_moves_zeros_between_linears(make: Make, family: str) -> None:
    trainer = make(
        family,
        pattern="0.6",
        masks={
            "scope": "global",
            "score": "sensitivity",
            "hysteresis": 0.1,
            "refresh_steps": 2,
            "frozen_share": 0.5,
        },
        optimiser={"second_moment": "gradient", "learning_rate": 1e-3},
    )
    before = [int((~mask).sum()) for mask in masks(trainer)]
    for _ in range(6):
        trainer.step()
    after = [int((~mask).sum()) for mask in masks(trainer)]
    assert before != after
    assert sum(before) == sum(after)
    rates = [figures.flip_rate for figures in trainer.figures()]
    assert next(rate for rate in rates if rate is not None) > 0


def test_low_rank_changes_alone_leave_the_weights_until_the_end(make: Make) -> None:
    trainer = make(train="lora", lora_rank=2, masks={"frozen_share": 1.0}, pruned=True)
    assert {name.rsplit(".", 1)[1] for name in trainer.parameters} == {"a_RI", "b_OR"}
    before = [each.weight.data.clone() for each in trainer.linears]
    for _ in range(3):
        trainer.step()
    for each, weight in zip(trainer.linears, before, strict=True):
        assert torch.equal(each.weight.data, weight)
    trainer.remove()
    for each, weight in zip(trainer.linears, before, strict=True):
        assert torch.equal(each.weight.data != 0, each.mask)
        assert not torch.equal(each.weight.data, weight)
