"""Stages that rebuild masks: exact zeros, dense values back, and no block gets worse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import secateur
from methods.blocks import SPARSITY, block_task
from secateur.blocks.passes import Part, catch_call, find_parts, recorded_passes
from secateur.blocks.tasks import BlockTask
from secateur.methods import BlockStage
from secateur.methods.barber import Barber
from secateur.methods.rebuild import Rebuild
from secateur.methods.rows import write_masks
from secateur.methods.swaps import Swaps
from secateur.patterns.pattern import (
    NM,
    Budget,
    Pattern,
    Unstructured,
    check_mask,
    parse_pattern,
    select,
)
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError
from secateur.solvers.block_loss import relative_error
from solvers.problems import predicted_change

PATTERNS = [str(SPARSITY), "2:4"]
STAGES = [
    Barber(batch_sequences=2),
    Barber(batch_sequences=2, ratio=1.0),
    Barber(batch_sequences=2, scope="linear"),
    Barber(batch_sequences=2, scope="column", ratio=0.5),
    Barber(batch_sequences=2, scope="block"),
    Swaps(batch_sequences=2),
    Swaps(batch_sequences=2, gradient="block"),
    Swaps(batch_sequences=2, reference="pruned", rounds=2, shortlist=3),
    Barber(batch_sequences=2, windows=4),
]


def allows(stage: BlockStage, pattern: Pattern) -> bool:
    return isinstance(pattern, Unstructured) or getattr(stage, "scope", "row") == "row"


def prune(task: BlockTask, init: str = "magnitude") -> dict[str, Tensor]:
    """Give the block a mask within rows; return a copy of all masks."""
    for name, dense_OI in task.dense.items():
        score_OI = dense_OI.abs()
        if init == "wanda" and task.mean_squares[name].any():
            score_OI = score_OI * task.mean_squares[name].sqrt()
        budget = Budget(task.pattern, (len(dense_OI),), (task.zeros[name],))
        task.masks[name] = select(score_OI, budget, "row")
    write_masks(task, task.masks)
    task.round_weights()
    return dict(task.masks)


@pytest.mark.parametrize("init", ["magnitude", "wanda"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize(
    ("stage", "text"),
    [(stage, text) for stage in STAGES for text in PATTERNS if allows(stage, parse_pattern(text))],
    ids=str,
)
def test_masks_stay_exact_and_no_block_gets_worse(
    stage: BlockStage, family: str, text: str, init: str, checkpoints: Callable[..., Path]
) -> None:
    pattern = parse_pattern(text)
    with block_task(checkpoints(family), torch.bfloat16, pattern) as task:
        masks = prune(task, init)
        before = task.held_out_error()
        stage.apply(task)
        after = task.held_out_error()
        assert after <= before
        assert len(task.notes) == 1
        assert f"held-out error from {before:.4g} to {after:.4g}" in task.notes[0]
        scope = getattr(stage, "scope", "row")
        for linear in task.linears:
            mask_OI, old_OI = task.masks[linear.name], masks[linear.name]
            dense_OI = task.dense[linear.name].bfloat16().float()
            assert torch.equal(linear.weight_OI, dense_OI * mask_OI)
            if scope != "block":
                budget = Budget(pattern, (len(mask_OI),), (task.zeros[linear.name],))
                check_mask(mask_OI, budget)
            if scope in ("row", "column"):
                over = 1 if scope == "row" else 0
                assert torch.equal(mask_OI.sum(over), old_OI.sum(over))
        assert sum(int((~mask).sum()) for mask in task.masks.values()) == sum(task.zeros.values())
        assert not any(p.requires_grad or p.grad is not None for p in task.block.parameters())


@pytest.mark.parametrize("stage", [Barber(batch_sequences=2, ratio=0.3), Swaps(batch_sequences=2)])
@pytest.mark.parametrize("text", PATTERNS)
def test_bad_masks_get_better(
    stage: BlockStage, text: str, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints("gpt2"), pattern=parse_pattern(text)) as task:
        prune(task)
        before = task.held_out_error()
        stage.apply(task)
        assert task.held_out_error() < 0.95 * before


@pytest.mark.parametrize("stage", [Barber(batch_sequences=2, ratio=1), Swaps(batch_sequences=2)])
def test_kept_weights_keep_their_values_and_restored_ones_get_the_dense_one(
    stage: BlockStage, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints("gpt2")) as task:
        old = prune(task)
        for linear in task.linears:
            linear.weight_OI.mul_(1.01)
        weights = {linear.name: linear.weight_OI.clone() for linear in task.linears}
        stage.apply(task)
        exchanged = 0
        for linear in task.linears:
            new_OI, old_OI = task.masks[linear.name], old[linear.name]
            stayed_OI, back_OI = new_OI & old_OI, new_OI & ~old_OI
            assert torch.equal(linear.weight_OI[stayed_OI], weights[linear.name][stayed_OI])
            assert torch.equal(linear.weight_OI[back_OI], task.dense[linear.name][back_OI])
            assert not linear.weight_OI[~new_OI].any()
            exchanged += int(back_OI.sum())
        assert exchanged > 0


@pytest.mark.parametrize("text", PATTERNS)
def test_ratio_zero_changes_nothing(text: str, checkpoints: Callable[..., Path]) -> None:
    with block_task(checkpoints("llama"), pattern=parse_pattern(text)) as task:
        masks = prune(task)
        weights = [p.clone() for p in task.block.parameters()]
        Barber(ratio=0, batch_sequences=2).apply(task)
        assert all(torch.equal(masks[name], task.masks[name]) for name in masks)
        assert all(map(torch.equal, weights, task.block.parameters()))


@pytest.mark.parametrize("pattern", [Unstructured(0), NM(2, 2)], ids=str)
@pytest.mark.parametrize("stage", [Barber(batch_sequences=2), Swaps(batch_sequences=2)])
def test_a_block_that_lost_nothing_stays_as_it_is(
    stage: BlockStage, pattern: Pattern, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints("llama"), pattern=pattern) as task:
        masks = prune(task)
        stage.apply(task)
        assert all(torch.equal(masks[name], task.masks[name]) for name in masks)
        assert task.held_out_error() < 1e-12


def test_masks_that_raise_the_error_are_refused(checkpoints: Callable[..., Path]) -> None:
    with block_task(checkpoints("llama")) as task:
        masks = prune(task, "wanda")
        weights = [p.clone() for p in task.block.parameters()]
        rebuild = Rebuild(task, "trial")
        for part in find_parts(task.block, task.linears):
            worst = {linear.name: ~task.masks[linear.name] for linear in part.linears}
            rebuild.offer(part, {"the removed half": worst})
        rebuild.note()
        assert all(torch.equal(masks[name], task.masks[name]) for name in masks)
        assert all(map(torch.equal, weights, task.block.parameters()))
        assert "none in self_attn" in task.notes[0]
        assert "none in mlp" in task.notes[0]


def test_no_more_windows_are_taken_than_wanted(checkpoints: Callable[..., Path]) -> None:
    with block_task(checkpoints("llama")) as task:
        fitted = task.stream.fitted
        for most, taken in ((1, 1), (4, 4), (100, fitted)):
            drawn = torch.cat(task.fitted_batches(2, most))
            assert len(drawn) == len(drawn.unique()) == taken
            assert int(drawn.max()) < fitted
    few, all_of_them = Barber(windows=4), Barber(windows=100)
    assert few.passes(8) < all_of_them.passes(8)
    assert few.passes(4) == all_of_them.passes(4)


def squares_one_by_one(task: BlockTask, part: Part) -> dict[str, Tensor]:
    """Mean square of each sequence's gradient at the dense weights, one sequence at a time."""
    weights = {
        linear.name: task.dense[linear.name].clone().requires_grad_() for linear in part.linears
    }
    squares = {name: torch.zeros_like(w_OI) for name, w_OI in weights.items()}
    count = task.stream.fitted
    for sequence in range(count):
        with torch.no_grad():
            call = catch_call(part, lambda s=sequence: task.output(slice(s, s + 1)))
            pruned = call.output()
        loss = torch.nn.functional.mse_loss(call.output_with(weights), pruned)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for square_OI, gradient_OI in zip(squares.values(), gradients, strict=True):
            if gradient_OI is not None:
                square_OI += gradient_OI.square() / count
    return squares


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("size", [1, 4])
def test_scores_come_from_the_gradient_of_each_sequence(
    family: str, size: int, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints(family)) as task:
        prune(task)
        for part in find_parts(task.block, task.linears):
            found = Barber(batch_sequences=size)._squared_gradients(task, part)
            for name, square_OI in squares_one_by_one(task, part).items():
                scale = float(square_OI.max())
                torch.testing.assert_close(
                    found[name], square_OI, rtol=1e-3, atol=1e-5 * scale + 1e-30
                )


def fitted_error(task: BlockTask) -> float:
    with torch.no_grad():
        batch = slice(0, task.stream.fitted)
        errors = [
            relative_error(task.output(slice(s, s + 1)), task.target(slice(s, s + 1)))
            for s in range(batch.start, batch.stop)
        ]
    return float(torch.cat(errors).double().mean())


@pytest.mark.parametrize("text", PATTERNS)
def test_prediction_is_that_of_the_block(text: str, checkpoints: Callable[..., Path]) -> None:
    """Exact for the last linear, whose rows are outputs; close for exchanges in other rows."""
    pattern = parse_pattern(text)
    generator = torch.Generator().manual_seed(3)
    with block_task(checkpoints("llama"), pattern=pattern) as task:
        prune(task, "wanda")
        before = fitted_error(task)
        for part in find_parts(task.block, task.linears):
            seen, last = Swaps(batch_sequences=2, gradient="block")._look(task, part)
            assert last == part.linears[-1].name
            for linear in part.linears:
                statistics = seen[linear.name]
                gradient_OI = statistics.gradient()
                gram_II, curvature_O = statistics.curvature()
                predicted, measured = [], []
                dense_OI, kept_OI = task.dense[linear.name], linear.weight_OI.clone()
                for _ in range(30):
                    delta_OI = torch.zeros_like(dense_OI)
                    row = int(torch.randint(len(dense_OI), (1,), generator=generator))
                    order = torch.randperm(dense_OI.shape[1], generator=generator)
                    removed = next(int(i) for i in order if kept_OI[row, i] != 0)
                    restored = next(int(i) for i in order if kept_OI[row, i] == 0)
                    delta_OI[row, removed] = -kept_OI[row, removed]
                    delta_OI[row, restored] = dense_OI[row, restored]
                    change_O = predicted_change(delta_OI, gradient_OI, gram_II, curvature_O)
                    linear.weight_OI.copy_(kept_OI + delta_OI)
                    predicted.append(float(change_O.sum()))
                    measured.append(fitted_error(task) - before)
                linear.weight_OI.copy_(kept_OI)
                both = torch.tensor([predicted, measured], dtype=torch.float64)
                if linear.name == "mlp.down_proj":
                    torch.testing.assert_close(both[0], both[1], rtol=1e-3, atol=1e-6)
                else:
                    assert float(both.corrcoef()[0, 1]) > 0.7, linear.name


@pytest.mark.parametrize("stage", [Barber(batch_sequences=2), Swaps(batch_sequences=2)])
def test_passes_in_bfloat16_do_as_well(stage: BlockStage, checkpoints: Callable[..., Path]) -> None:
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        with block_task(checkpoints("gpt2"), dtype=dtype) as task:
            prune(task)
            stage.apply(task)
            errors.append(task.held_out_error())
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("stage", [Barber(batch_sequences=2), Swaps(batch_sequences=2)])
def test_a_linear_that_no_token_reached_stays_as_it_is(
    stage: BlockStage, checkpoints: Callable[..., Path]
) -> None:
    with block_task(checkpoints("mixtral")) as task:
        masks = prune(task)
        # All tokens go to the same two experts.
        for name, module in task.block.named_modules():
            if name.endswith(".gate"):
                module.get_parameter("weight").data.zero_()
        with recorded_passes(task.linears) as passes:
            task.output(slice(0, 4))
        idle = set(masks) - {each.linear.name for each in passes}
        assert len(idle) == 4
        stage.apply(task)
        assert all(torch.equal(task.masks[name], masks[name]) for name in idle)


def test_zeros_may_move_between_the_linears_of_a_part(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_mapping(
        {
            "pattern": "0.37",
            "stages": [
                {"method": "magnitude"},
                {"method": "barber", "scope": "block"},
                {"method": "refit"},
            ],
            "calibration": {"source": str(text_file), "samples": 8, "length": 32},
            "dtype": "float32",
        }
    )
    secateur.prune(checkpoints("llama"), recipe, tmp_path / "pruned")
    inspection = secateur.inspect(tmp_path / "pruned")
    assert inspection.zeros == round(0.37 * inspection.weights)


def test_granularities_that_leave_groups_are_refused() -> None:
    stages = [{"method": "wanda"}, {"method": "barber", "scope": "block"}]
    Recipe.from_mapping({"pattern": "0.5", "stages": stages})
    with pytest.raises(SecateurError, match=r"2:4 barber exchanges weights within groups"):
        Recipe.from_mapping({"pattern": "2:4", "stages": stages})


@pytest.mark.parametrize(("ratio", "said"), [(1.5, "ratio"), ("best", "0.01 as released")])
def test_ratios_outside_their_range_are_refused(ratio: object, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        Recipe.from_mapping({"stages": [{"method": "wanda"}, {"method": "barber", "ratio": ratio}]})


def test_fewer_windows_than_a_step_takes_are_enough(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    stages = [
        {"method": "besa-rates", "batch_sequences": 8},
        {"method": "barber", "scope": "row", "windows": 2},
    ]
    recipe = Recipe.from_mapping(
        {
            "stages": stages,
            "calibration": {"source": str(text_file), "samples": 4, "length": 32},
            "batch_tokens": 64,
        }
    )
    report = secateur.prune(checkpoints("llama"), recipe, tmp_path / "out").report
    assert report.sparsity.counted == 0.5
