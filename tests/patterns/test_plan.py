"""Plans: exact totals, the file, and what is said about one that does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import secateur
from secateur.models.checkpoint import Checkpoint
from secateur.models.experts import linear_shapes
from secateur.models.structure import BlockList
from secateur.models.text_path import find_blocks
from secateur.patterns.plan import Plan, uniform_plan
from secateur.runs.errors import SecateurError
from tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_and_loaded_model_have_the_same_plan(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints(family)
    pattern = secateur.parse_pattern("0.3")
    skeleton = uniform_plan(linear_shapes(Checkpoint.at(folder).blocks), pattern)
    loaded = uniform_plan(
        linear_shapes(find_blocks(AutoModelForCausalLM.from_pretrained(folder))), pattern
    )
    assert skeleton == loaded


@settings(max_examples=50)
@given(sparsity=st.floats(0, 0.999))
def test_zeros_add_up_to_the_rounded_share(
    sparsity: float, checkpoints: Callable[..., Path]
) -> None:
    blocks = Checkpoint.at(checkpoints("llama")).blocks
    plan = uniform_plan(linear_shapes(blocks), secateur.Unstructured(sparsity))
    weights = sum(plan.weights.values())
    assert sum(plan.zeros.values()) == round(sparsity * weights)
    for name, zeros in plan.zeros.items():
        assert abs(zeros - sparsity * plan.weights[name]) <= 1


@pytest.fixture(scope="module")
def blocks(checkpoints: Callable[..., Path]) -> BlockList:
    return Checkpoint.at(checkpoints("llama")).blocks


@pytest.mark.parametrize("pattern", ["0.5", "0.123456789", "2:4"])
def test_plans_go_through_files(pattern: str, blocks: BlockList, tmp_path: Path) -> None:
    plan = uniform_plan(linear_shapes(blocks), secateur.parse_pattern(pattern))
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    again = Plan.from_file(tmp_path / "plan.json")
    again.check_fits(linear_shapes(blocks))
    assert again == plan
    assert again.to_json() == text
    assert list(again.zeros) == list(plan.zeros)
    assert len(text.splitlines()) == len(plan.weights) + 7


FIRST = "model.layers.0.self_attn.q_proj"
"""Its weights and zeros are 1024 and 512, on line 6 of a plan for one half."""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("q_proj", "q_prj", f"line 6: the model has no linear .*q_prj; did you mean {FIRST}?"),
        (f'    "{FIRST}": {{"weights": 1024, "zeros": 512}},\n', "",
         f"line 5: the linear {FIRST} is missing; add .*1024, .*512"),
        ("1024", "1000", f"line 6: {FIRST} has 1024 weights in the model, not 1000"),
        ('"zeros": 512}', '"zeros": 1025}', "line 6: 1025 zeros do not fit in the 1024 weights"),
        ('"zeros": 512}', '"zeros": -1}', "line 6: -1 zeros do not fit in the 1024 weights"),
        ('"zeros": 512}', '"zeros": 500}', 'line 4: "zeros" says 13824, .* write 13812'),
        ('"weights": 27648', '"weights": 24', 'line 3: "weights" says 24, .* write 27648'),
        ('"pattern": "0.5"', '"pattern": "0.25"',
         r'line 2: a sparsity of 0\.25 means 6912 zeros, but the plan has 13824; write "0\.5"'),
        ('"pattern": "0.5"', '"pattern": "half"', "line 2: pattern 'half' is not understood"),
        ('"pattern": "0.5"', '"pattern": "1:4"', "line 6: pattern 1:4 puts exactly 768 zeros"),
        ('"zeros": 512}', '"zeros": "512"}', "line 6: .* needs two whole numbers"),
        ('"zeros": 512}', '"zeros": 512.0}', "line 6: .* needs two whole numbers"),
        ('"zeros": 512}', '"zeros": {"a": [1]}}', "line 6: .* needs two whole numbers"),
        ('"zeros": 512}', '"zeros": 1, "zeros": 512}', "zeros is there a second time"),
        ('"zeros": 512}', '"zero": 512}', "line 6: .* needs two whole numbers"),
        ('"zeros": 13824', '"zeros": true', 'line 4: "zeros" must be a whole number'),
        ('  "zeros": 13824,\n', "", 'lacks the key "zeros"'),
        ('"pattern"', '"patern"', "line 2: unknown key patern; did you mean pattern?"),
        ("k_proj", "q_proj", "line 7: .* is there a second time; remove one"),
        ('512},', '512}', "line 7: this is not valid JSON"),
        ('"zeros": 512}', '"zeros": ' + "[" * 100_000, "is no plan"),
        ('"zeros": 512}', '"zeros": ' + "9" * 5000 + "}", "is no plan"),
        ('"zeros": 512}', '"zeros": 1' + "0" * 400 + "}", "line 6: 10+ zeros do not fit"),
        ("q_proj", r"\\ud83d", ": the model has no linear"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(
    old: str, new: str, message: str, blocks: BlockList, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    text = uniform_plan(linear_shapes(blocks), secateur.Unstructured(0.5)).to_json()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SecateurError, match=re.escape(str(path)) + ".*" + message):
        Plan.from_file(path).check_fits(linear_shapes(blocks))


def test_lines_are_found_however_the_file_is_laid_out(blocks: BlockList, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    values = json.loads(uniform_plan(linear_shapes(blocks), secateur.Unstructured(0.5)).to_json())
    values["linears"][FIRST]["zeros"] = 2000
    path.write_text("\n\n" + json.dumps(dict(reversed(values.items())), indent="\t"))
    number = 1 + next(i for i, line in enumerate(path.read_text().splitlines()) if FIRST in line)
    with pytest.raises(SecateurError, match=f"line {number}: 2000 zeros do not fit"):
        Plan.from_file(path).check_fits(linear_shapes(blocks))


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(SecateurError, match="cannot be read"):
        Plan.from_file(path)
    for text, message in [("[]", "is no plan"), ("{}", "lacks the key"), ("", "line 1: this is")]:
        path.write_text(text)
        with pytest.raises(SecateurError, match=message):
            Plan.from_file(path)
    for linears in ("[]", "[1]", '"all"', "null"):
        path.write_text(f'{{"pattern": "0.5", "weights": 1, "zeros": 1,\n"linears": {linears}}}')
        with pytest.raises(SecateurError, match='line 2: "linears" must be an object'):
            Plan.from_file(path)
