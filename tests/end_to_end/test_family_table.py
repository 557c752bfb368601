"""docs/families.md says what becomes of each family; some are tried here, all by ``make soak``."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import Trial, every_family, try_family
from family_table import PAGE, row

# Of each kind that there is, the families that most people have.
TRIED = (
    "aria_text bamba deepseek_v3 falcon_h1 gemma3 gemma4_text gpt_oss granitemoehybrid jamba "
    "jetmoe lfm2 lfm2_moe llama4_text llava mamba2 mistral3 nemotron_h paligemma qwen2_5_vl "
    "qwen3_moe qwen3_next qwen3_vl recurrent_gemma smolvlm zamba2"
).split()


@pytest.mark.parametrize("family", TRIED)
def test_the_page_says_what_becomes_of_a_family(
    family: str, text_file: Path, tmp_path: Path
) -> None:
    trial: Trial = try_family(family, text_file, tmp_path)
    assert row(trial) in PAGE.read_text("utf-8").splitlines()


def test_the_page_has_a_line_for_every_family() -> None:
    text = PAGE.read_text("utf-8")
    written = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    assert [name for name in every_family() if name not in written] == []
