"""What every registered stage keeps, through `secateur.prune` on tiny models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
from interruption import interrupted_after
from secateur.methods import STAGES, BlockStage, GroupStage
from secateur.models.experts import unstacked_experts
from secateur.models.structure import find_linears
from secateur.models.text_path import find_blocks
from secateur.patterns.pattern import NM, Budget, check_mask
from secateur.patterns.plan import Plan
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError
from tiny import make_checkpoint, make_tokenizer

PATTERNS = ("0.5", "0.75", "2:4")
# A stage whose defaults do not suit rows of 32 columns has its options here.
OPTIONS: dict[str, dict[str, Any]] = {"quantize": {"group": 16}}
# The columns of a norm's output that are made zero for every token.
DEAD = slice(8, 12)
# A search moves weights before it chooses, so that equal ones do not stay equal.
SEARCHES = {"admm"}


def find_recipe(method: str, pattern: str, text: Path, **options: Any) -> Recipe:
    """The shortest recipe with the stage: alone, or with those that it cannot be without."""
    calibration = {"source": str(text), "samples": 4, "length": 32}
    refused: list[SecateurError] = []
    for length in (1, 2, 3):
        for others in itertools.product(STAGES, repeat=length - 1):
            for names in dict.fromkeys([(*others, method), (method, *others)]):
                stages = [{"method": name, **OPTIONS.get(name, {})} for name in names]
                for stage in stages:
                    stage |= options if stage["method"] == "quantize" else {}
                try:
                    return Recipe.from_mapping(
                        {"pattern": pattern, "stages": stages, "calibration": calibration}
                    )
                except SecateurError as error:
                    refused.append(error)
    # What the stage says itself tells more than what is said of those before it.
    raise max(refused, key=lambda error: (method in str(error)) + (pattern in str(error)))


def allows(method: str, pattern: str) -> bool:
    stage = STAGES[method].model_validate(OPTIONS.get(method, {}))
    try:
        stage.check_pattern(secateur.parse_pattern(pattern))
    except ValueError:
        return False
    return True


# A stage that takes none of the patterns removes nothing itself: it works on a sparse model.
CASES = [
    (method, pattern)
    for method in STAGES
    for pattern in [p for p in PATTERNS if allows(method, p)] or ["0.0"]
]
FIRST_CASES = list(dict(reversed(CASES)).items())[::-1]
CHOOSING_CASES = [
    (method, pattern)
    for method, pattern in CASES
    if STAGES[method].chooses_mask and pattern != "0.0"
]
TIED_CASES = [each for each in CHOOSING_CASES if each[0] not in SEARCHES]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load(tmp_path_factory.mktemp("dense") / "model", "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A mixture that sends every token to the same two of its four experts."""
    model = load(tmp_path_factory.mktemp("experts") / "model", "mixtral")
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.zero_()
    return model


def load(folder: Path, family: str) -> PreTrainedModel:
    # Without an epsilon the norm of a vector of ones and minus ones is that vector.
    make_checkpoint(family, folder, torch.bfloat16, num_hidden_layers=1, rms_norm_eps=0.0)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def linears_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the weights of all prunable linears, (out, in), by full name."""
    blocks = find_blocks(model)
    weights = {}
    for index, block in enumerate(blocks):
        with unstacked_experts(block):
            for linear in find_linears(block):
                weights[f"{blocks.name(index)}.{linear.name}"] = linear.weight_OI.detach().clone()
    return weights


def make_sparse(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in which half of the weights are zero, at random."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for block in find_blocks(model):
        for linear in find_linears(block):
            drawn_OI = torch.rand(linear.weight_OI.shape, generator=generator)
            linear.weight_OI.mul_(drawn_OI > 0.5)
    return model


@contextmanager
def watched(method: str) -> Iterator[list[str]]:
    """Within the context the stage notes its runs, and each is held to what a task asks of it."""
    stage, runs = STAGES[method], []
    apply = stage.apply  # type: ignore[attr-defined]

    def watch(self: Any, task: Any) -> None:
        dense = task.dense if isinstance(self, BlockStage) else {}
        dense = {"": task.dense_OI} if isinstance(self, GroupStage) else dense
        before = {name: dense_OI.clone() for name, dense_OI in dense.items()}
        apply(self, task)
        runs.append(method)
        assert all(torch.equal(before[name], dense_OI) for name, dense_OI in dense.items())
        if isinstance(self, BlockStage):
            # What follows in the block sees the weights of the file.
            for linear in task.linears:
                w_OI = linear.weight_OI
                assert torch.equal(w_OI, w_OI.to(task.stored).to(w_OI.dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "apply", watch)
        yield runs


@dataclass(frozen=True)
class Pruned:
    """Masks and weights of all linears, (out, in), by full name, and those no token reached."""

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    idle: list[str]


def prune(model: PreTrainedModel, method: str, pattern: str, text: Path, **values: Any) -> Pruned:
    """Prune a copy of the model by the stage, and check what holds for every stage and model.

    Zeros are those of the plan, each linear's or, if zeros move between linears, those of all;
    every group has the pattern; nothing is left outside the mask; all weights are finite.
    """
    recipe = find_recipe(method, pattern, text, format="dequantized")
    recipe = Recipe.model_validate({**recipe.model_dump(), "dtype": "float32", **values})
    model = make_sparse(model) if pattern == "0.0" else copy.deepcopy(model)
    zeros = {name: int((w_OI == 0).sum()) for name, w_OI in linears_of(model).items()}
    plan = secateur.plan(model, recipe, tokenizer=make_tokenizer())
    with watched(method) as runs:
        result = secateur.prune(model, recipe, tokenizer=make_tokenizer())
    assert runs, "the stage did its work"
    weights = linears_of(model)
    assert result.masks.keys() == weights.keys() == plan.zeros.keys()
    removed = {name: int((~mask_OI).sum()) for name, mask_OI in result.masks.items()}
    if pattern == "0.0":
        assert removed == zeros
    elif any(stage.unstructured_only for stage in recipe.stages):
        assert sum(removed.values()) == sum(plan.zeros.values())
    else:
        assert removed == plan.zeros
    for name, mask_OI in result.masks.items():
        assert not weights[name][~mask_OI].any()
        assert torch.isfinite(weights[name]).all()
        if isinstance(recipe.pattern, NM):
            check_mask(mask_OI, Budget(recipe.pattern, (len(mask_OI),), (removed[name],)))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    prefix = find_blocks(model).name(0)
    linears = result.report.blocks[0].linears
    idle = [f"{prefix}.{name}" for name in linears if linears[name].relative_error is None]
    return Pruned(result.masks, weights, idle)


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_zeros_are_exact_and_every_group_has_the_pattern(
    method: str, pattern: str, dense: PreTrainedModel, text_file: Path
) -> None:
    pruned = prune(dense, method, pattern, text_file)
    for name, mask_OI in pruned.masks.items():
        # Rounding to a grid makes further zeros; nothing else does.
        if method not in ("quantize", "scales"):
            assert torch.equal(pruned.weights[name] != 0, mask_OI), name


@pytest.mark.parametrize(("method", "pattern"), list(itertools.product(STAGES, PATTERNS)))
def test_a_pattern_that_a_stage_cannot_give_is_refused_by_its_name(
    method: str, pattern: str, text_file: Path
) -> None:
    if allows(method, pattern):
        find_recipe(method, pattern, text_file)
        return
    with pytest.raises(SecateurError, match=rf"{method} .*{pattern}"):
        find_recipe(method, pattern, text_file)


@pytest.mark.parametrize("method", [name for name in STAGES if not STAGES[name].chooses_mask])
def test_a_stage_that_needs_a_mask_is_refused_without_one(method: str) -> None:
    pattern = next(pattern for pattern in PATTERNS if allows(method, pattern))
    with pytest.raises(SecateurError, match="the first stage must choose a mask"):
        Recipe.from_mapping({"pattern": pattern, "stages": [{"method": method}]})


@pytest.mark.parametrize(("method", "pattern"), TIED_CASES)
def test_of_equal_scores_the_first_positions_go(
    method: str, pattern: str, dense: PreTrainedModel, tmp_path: Path
) -> None:
    model = copy.deepcopy(dense)
    for weight in linears_of_module(model):
        weight.data = torch.where(weight > 0, 0.125, -0.125).to(weight.dtype)
    # Every window holds each of 32 characters once, and their embeddings are the rows of a
    # Hadamard matrix: the Gram matrix of the first linears' inputs is the identity.
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 32:
        hadamard = torch.cat([hadamard.repeat(1, 2), torch.cat([hadamard, -hadamard], 1)])
    table = model.get_input_embeddings().weight
    table.data = hadamard[torch.arange(len(table)) % 32].to(table.dtype)
    model.model.layers[0].input_layernorm.weight.data.fill_(1)
    (tmp_path / "text.txt").write_text("".join(map(chr, range(64, 96))) * 40)
    pruned = prune(model, method, pattern, tmp_path / "text.txt")
    for name in ("q_proj", "k_proj", "v_proj"):
        mask_OI = pruned.masks[f"model.layers.0.self_attn.{name}"]
        group = 4 if pattern == "2:4" else mask_OI.shape[1]
        steps = mask_OI.unflatten(1, (-1, group)).to(torch.int8).diff(dim=2)
        assert (steps >= 0).all(), f"{name}: a kept weight lies before a removed one"


def linears_of_module(model: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
    for block in find_blocks(model):
        for linear in find_linears(block):
            yield linear.module.get_parameter("weight")


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_inputs_that_are_always_zero_lose_their_weights_first(
    method: str, pattern: str, dense: PreTrainedModel, text_file: Path
) -> None:
    model = copy.deepcopy(dense)
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.data[DEAD] = 0
    pruned = prune(model, method, pattern, text_file)
    stage = STAGES[method]
    sees_inputs = getattr(stage, "needs", "nothing") != "nothing"
    sees_inputs |= getattr(stage, "needs_norms", False)
    if (method, pattern) in CHOOSING_CASES and pattern != "2:4" and sees_inputs:
        for name, mask_OI in pruned.masks.items():
            if not name.endswith(("o_proj", "down_proj")):
                assert not mask_OI[:, DEAD].any(), name


@pytest.mark.parametrize(("method", "pattern"), FIRST_CASES)
def test_fewer_tokens_than_columns_are_enough(
    method: str, pattern: str, dense: PreTrainedModel, text_file: Path
) -> None:
    text = {"source": str(text_file), "samples": 4, "length": 4}
    prune(dense, method, pattern, text_file, calibration=text)


@pytest.mark.parametrize(("method", "pattern"), FIRST_CASES)
def test_experts_that_no_token_reaches_are_pruned_like_all_others(
    method: str, pattern: str, experts: PreTrainedModel, text_file: Path
) -> None:
    pruned = prune(experts, method, pattern, text_file)
    assert len(pruned.idle) == 4
    for name in pruned.idle:
        assert pruned.masks[name].any(), f"{name} is emptied"


@pytest.mark.parametrize(("method", "pattern"), FIRST_CASES)
def test_weights_that_are_no_numbers_are_refused(
    method: str, pattern: str, dense: PreTrainedModel, text_file: Path
) -> None:
    model = copy.deepcopy(dense)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SecateurError, match=r"NaN|not finite"):
        prune(model, method, pattern, text_file)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name in ("plan.json", "config.json")
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("llama", folder / "dense", torch.bfloat16, num_hidden_layers=2)

    def give(pattern: str) -> Path:
        if pattern != "0.0":
            return folder / "dense"
        if not (folder / "sparse").exists():
            model = AutoModelForCausalLM.from_pretrained(folder / "dense")
            make_sparse(model).save_pretrained(folder / "sparse")
            make_tokenizer().save_pretrained(folder / "sparse")
        return folder / "sparse"

    return give


@pytest.mark.parametrize(("method", "pattern"), FIRST_CASES)
def test_a_killed_run_ends_with_the_files_of_a_whole_one(
    method: str,
    pattern: str,
    checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source, recipe = checkpoint(pattern), find_recipe(method, pattern, text_file)
    before = files_in(source)
    report = secateur.prune(source, recipe, tmp_path / "whole").report
    assert files_in(source) == before
    plan = Plan.from_file(tmp_path / "whole" / "plan.json")
    counted = secateur.inspect(tmp_path / "whole")
    assert counted.zeros == sum(plan.zeros.values()) + report.sparsity.rounded_to_zero
    assert report.sparsity.zeros == counted.zeros
    assert method in [stage["method"] for stage in report.recipe["stages"]]
    assert method in (tmp_path / "whole" / "secateur" / "report.html").read_text(encoding="utf-8")

    with interrupted_after(blocks=1):
        secateur.prune(source, recipe, tmp_path / "killed")
    assert secateur.prune(source, recipe, tmp_path / "killed").report.resumed_blocks == 1
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")
