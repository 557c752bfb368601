"""What every registered allocation keeps, through `secateur.plan` and `secateur.prune`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import secateur
from interruption import interrupted_after
from secateur.allocation import ALLOCATIONS
from secateur.allocation.allocation import Unequal
from secateur.patterns.plan import Plan
from secateur.runs.errors import SecateurError

MODELS = ("llama", "mixtral")
SPARSITIES = ("0.0", "0.37", "0.6", "0.949")


def make_recipe(rule: str, pattern: str, text: Path, **options: object) -> secateur.Recipe:
    return secateur.Recipe.from_mapping(
        {
            "pattern": pattern,
            "stages": [{"method": "magnitude"}],
            "allocation": {"method": rule, **options},
            "calibration": {"source": str(text), "samples": 8, "length": 32},
        }
    )


@pytest.fixture(scope="module")
def options(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], dict[str, object]]:
    """Options that an allocation cannot do without."""
    folder = tmp_path_factory.mktemp("plans")

    def give(rule: str, family: str, pattern: str) -> dict[str, object]:
        if rule != "plan":
            return {}
        path = folder / f"{family}-{pattern.replace(':', '-')}.json"
        source = "uniform" if pattern == "2:4" else "ramp"
        rise = {} if pattern == "2:4" else {"rise": 0.02}
        recipe = make_recipe(source, pattern, text_file, **rise)
        secateur.plan(checkpoints(family), recipe).write(path)
        return {"file": str(path)}

    return give


Options = Callable[[str, str, str], dict[str, object]]


@pytest.mark.parametrize("rule", ALLOCATIONS)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_totals_are_exact_within_bounds_and_the_same_again(
    rule: str,
    family: str,
    sparsity: str,
    options: Options,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    recipe = make_recipe(rule, sparsity, text_file, **options(rule, family, sparsity))
    plan = secateur.plan(checkpoints(family), recipe)
    assert sum(plan.zeros.values()) == round(float(sparsity) * sum(plan.weights.values()))
    most = max(getattr(recipe.allocation, "max_sparsity", 1.0), float(sparsity))
    for name, zeros in plan.zeros.items():
        assert 0 <= zeros <= most * plan.weights[name] + 1
    assert secateur.plan(checkpoints(family), recipe) == plan
    plan.write(tmp_path / "plan.json")
    again = Plan.from_file(tmp_path / "plan.json")
    assert again == plan
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_n_m_fixes_the_sparsity_of_every_linear(
    rule: str, options: Options, checkpoints: Callable[..., Path], text_file: Path
) -> None:
    recipe = make_recipe(rule, "2:4", text_file, **options(rule, "llama", "2:4"))
    if issubclass(ALLOCATIONS[rule], Unequal):
        with pytest.raises(SecateurError, match=f"2:4 fixes the sparsity .* allocation {rule}"):
            secateur.plan(checkpoints("llama"), recipe)
        return
    plan = secateur.plan(checkpoints("llama"), recipe)
    assert all(2 * zeros == plan.weights[name] for name, zeros in plan.zeros.items())


@pytest.mark.parametrize(
    "rule", [rule for rule in ALLOCATIONS if issubclass(ALLOCATIONS[rule], Unequal)]
)
def test_a_sparsity_beyond_the_bound_of_each_linear_is_refused(
    rule: str, checkpoints: Callable[..., Path], text_file: Path
) -> None:
    with pytest.raises(SecateurError, match=r"0\.96 cannot be reached .* more than 0\.95"):
        secateur.plan(checkpoints("llama"), make_recipe(rule, "0.96", text_file))
    recipe = make_recipe(rule, "0.96", text_file, max_sparsity=0.99)
    plan = secateur.plan(checkpoints("llama"), recipe)
    assert sum(plan.zeros.values()) == round(0.96 * sum(plan.weights.values()))


def weights_in(folder: Path) -> dict[str, bytes]:
    paths = [*sorted(folder.glob("*.safetensors")), folder / "plan.json"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_a_run_follows_its_plan_and_a_killed_one_uses_it_again(
    rule: str,
    options: Options,
    checkpoints: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(rule, "0.6", text_file, **options(rule, "llama", "0.6"))
    source, whole, killed = checkpoints("llama"), tmp_path / "whole", tmp_path / "killed"
    report = secateur.prune(source, recipe, whole).report
    assert report.recipe["allocation"]["method"] == rule
    plan = secateur.plan(source, recipe)
    assert Plan.from_file(whole / "plan.json") == plan
    linears = secateur.inspect(whole).linears
    assert {each.name.removesuffix(".weight"): each.zeros for each in linears} == plan.zeros

    with interrupted_after(blocks=1):
        secateur.prune(source, recipe, killed)
    # What was decided is used again, not measured again.
    monkeypatch.setattr(ALLOCATIONS[rule], "allocate", None)
    assert secateur.prune(source, recipe, killed).report.resumed_blocks == 1
    assert weights_in(killed) == weights_in(whole)
