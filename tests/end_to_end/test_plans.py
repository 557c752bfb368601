"""Plans that runs follow: written, edited, executed, resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import secateur
from secateur.patterns.plan import Plan
from secateur.runs.errors import SecateurError
from tiny import make_tokenizer


def make_recipe(text: Path, **values: object) -> secateur.Recipe:
    return secateur.Recipe.from_mapping(
        {
            "stages": [{"method": "sparsegpt"}],
            "calibration": {"source": str(text), "samples": 8, "length": 32},
            **values,
        }
    )


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def counted(folder: Path) -> dict[str, int]:
    return {
        linear.name.removesuffix(".weight"): linear.zeros
        for linear in secateur.inspect(folder).linears
    }


def by_block(zeros: dict[str, int]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for name, count in zeros.items():
        totals[name.rsplit(".", 2)[0]] += count
    return totals


@pytest.mark.parametrize(
    "stages",
    [["magnitude"], ["wanda", "refit"], ["sparsegpt"], ["admm"]],
    ids=lambda stages: "+".join(stages),
)
def test_an_edited_plan_is_executed_to_the_zero(
    stages: list[str], checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plan = secateur.plan(checkpoints("llama"), make_recipe(text_file, allocation="ramp"))
    plan.write(path)
    values = json.loads(path.read_text())
    # One linear stays dense, one goes altogether, a third makes up for the difference.
    dense, gone, other = list(values["linears"])[3:6]
    moved = values["linears"][dense]["zeros"] + values["linears"][gone]["zeros"]
    values["linears"][dense]["zeros"] = 0
    values["linears"][gone]["zeros"] = values["linears"][gone]["weights"]
    values["linears"][other]["zeros"] += moved - values["linears"][gone]["weights"]
    path.write_text(json.dumps(values, indent=1))

    recipe = make_recipe(
        text_file,
        stages=[{"method": stage} for stage in stages],
        allocation={"method": "plan", "file": str(path)},
    )
    result = secateur.prune(checkpoints("llama"), recipe, tmp_path / "out")
    asked = {name: linear["zeros"] for name, linear in values["linears"].items()}
    assert counted(tmp_path / "out") == asked
    assert Plan.from_file(tmp_path / "out" / "plan.json").zeros == asked
    assert result.report.sparsity.zeros == values["zeros"]
    assert result.report.blocks[0].linears[gone.removeprefix("model.layers.0.")].sparsity == 1


def test_auto_keeps_the_total_that_each_block_gets_by_the_final_loss(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(text_file, pattern=0.6, stages="auto")
    assert recipe.allocation.method == "loss"
    result = secateur.prune(checkpoints("llama"), recipe, tmp_path / "out")
    planned = secateur.plan(checkpoints("llama"), recipe).zeros
    zeros = counted(tmp_path / "out")
    assert by_block(zeros) == by_block(planned)
    assert zeros != planned
    assert result.report.sparsity.zeros == sum(planned.values())


def test_a_model_in_memory_follows_the_same_plan_as_its_checkpoint(
    checkpoints: Callable[..., Path], text_file: Path
) -> None:
    from transformers import AutoModelForCausalLM

    recipe = make_recipe(text_file, allocation="loss")
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    tokenizer = make_tokenizer()
    plan = secateur.plan(model, recipe, tokenizer=tokenizer)
    assert plan == secateur.plan(checkpoints("llama"), recipe)
    result = secateur.prune(model, recipe, tokenizer=tokenizer)
    assert {name: int((~mask).sum()) for name, mask in result.masks.items()} == plan.zeros


def test_another_plan_or_allocation_is_another_run(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source, output = checkpoints("llama"), tmp_path / "out"
    first = secateur.plan(source, make_recipe(text_file, allocation="ramp"))
    other = secateur.plan(source, make_recipe(text_file))
    path, moved = tmp_path / "plan.json", tmp_path / "moved.json"
    first.write(path)
    recipe = make_recipe(text_file, allocation={"method": "plan", "file": str(path)})
    secateur.prune(source, recipe, output)
    other.write(path)
    with pytest.raises(SecateurError, match="begun with another recipe allocation"):
        secateur.prune(source, recipe, output)
    with pytest.raises(SecateurError, match="begun with another recipe allocation"):
        secateur.prune(source, make_recipe(text_file, allocation="owl"), output)
    # The same plan under another name, laid out in another way, is the same run.
    moved.write_text(json.dumps(json.loads(first.to_json())))
    recipe = make_recipe(text_file, allocation={"method": "plan", "file": str(moved)})
    assert secateur.prune(source, recipe, output).report.sparsity.zeros == sum(first.zeros.values())
    secateur.prune(source, make_recipe(text_file), output, restart=True)
    assert Plan.from_file(output / "plan.json") == other


def test_a_plan_that_does_not_fit_starts_nothing(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    secateur.plan(checkpoints("gpt2"), make_recipe(text_file)).write(path)
    recipe = make_recipe(text_file, allocation={"method": "plan", "file": str(path)})
    with pytest.raises(SecateurError, match=r"plan\.json, line 6: the model has no linear"):
        secateur.prune(checkpoints("llama"), recipe, tmp_path / "out")
    with pytest.raises(SecateurError, match=r"for pattern 0\.5 and the run asks for 0\.7"):
        secateur.prune(
            checkpoints("gpt2"),
            recipe.model_copy(update={"pattern": secateur.parse_pattern("0.7")}),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
