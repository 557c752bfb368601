"""Single allocations on tiny models: what each rule does, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import secateur
from secateur.runs.errors import SecateurError


def plan(model: Path, text: Path, pattern: str = "0.6", **allocation: object) -> secateur.Plan:
    recipe = secateur.Recipe.from_mapping(
        {
            "pattern": pattern,
            "allocation": allocation,
            "calibration": {"source": str(text), "samples": 8, "length": 32},
        }
    )
    return secateur.plan(model, recipe)


def block_sparsities(made: secateur.Plan) -> list[float]:
    blocks: dict[str, list[int]] = {}
    for name, weights in made.weights.items():
        sums = blocks.setdefault(name.split(".")[2], [0, 0])
        sums[0] += made.zeros[name]
        sums[1] += weights
    return [zeros / weights for zeros, weights in blocks.values()]


def test_ramp_rises_by_what_was_asked_for(
    checkpoints: Callable[..., Path], text_file: Path
) -> None:
    first, middle, last = block_sparsities(
        plan(checkpoints("llama"), text_file, method="ramp", rise=0.3)
    )
    assert (first, middle, last) == pytest.approx((0.45, 0.6, 0.75), abs=1e-3)


@pytest.mark.parametrize("rule", ["owl", "dlp"])
def test_the_extreme_blocks_are_twice_the_limit_apart(
    rule: str, checkpoints: Callable[..., Path], text_file: Path
) -> None:
    sparsities = block_sparsities(plan(checkpoints("llama"), text_file, method=rule, limit=0.1))
    assert max(sparsities) - min(sparsities) == pytest.approx(0.2, abs=1e-3)


def test_sensitivity_moves_zeros_inside_blocks_only(
    checkpoints: Callable[..., Path], text_file: Path
) -> None:
    made = plan(checkpoints("llama"), text_file, method="sensitivity")
    assert block_sparsities(made) == pytest.approx([0.6] * 3, abs=1e-4)
    shares = {zeros / made.weights[name] for name, zeros in made.zeros.items()}
    assert max(shares) - min(shares) > 0.05


@pytest.mark.parametrize("limit", [0.0, 0.03, 0.12])
def test_loss_keeps_blocks_within_its_limit(
    limit: float, checkpoints: Callable[..., Path], text_file: Path
) -> None:
    made = plan(checkpoints("llama"), text_file, method="loss", limit=limit)
    assert all(abs(each - 0.6) <= limit + 1e-3 for each in block_sparsities(made))
    if limit:
        assert max(abs(each - 0.6) for each in block_sparsities(made)) > limit / 4


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ("owll", "no known method 'owll'; did you mean owl"),
        ({"method": "owl", "limitt": 1}, "unknown key allocation.owl.limitt; did you mean limit"),
        ({"method": "owl", "limit": -1}, "allocation.owl.limit is not valid"),
        ({"limit": 0.1}, "allocation lacks the key method; each method is one of uniform, ramp"),
        ("plan", "allocation.plan.file is not valid"),
    ],
)
def test_recipe_errors_name_the_key(allocation: object, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        secateur.Recipe.from_mapping({"allocation": allocation})


def test_recipe_takes_a_bare_name_and_round_trips(tmp_path: Path) -> None:
    for allocation in ("loss", {"method": "plan", "file": "plan.json"}):
        recipe = secateur.Recipe.from_mapping({"allocation": allocation})
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert secateur.Recipe.from_file(tmp_path / "recipe.yaml") == recipe
