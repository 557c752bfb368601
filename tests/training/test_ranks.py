"""Several processes train as one would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.runs.errors import SecateurError
from secateur.training.ranks import Ranks


def test_shares_cover_a_step_once() -> None:
    for world in (1, 2, 3, 6):
        shares = [Ranks(rank, world).share(6) for rank in range(world)]
        windows = [index for share in shares for index in range(share.start, share.stop)]
        assert windows == list(range(6))
        assert {share.stop - share.start for share in shares} == {6 // world}
    with pytest.raises(SecateurError, match="6 windows cannot be divided evenly among 4"):
        Ranks(0, 4).share(6)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_windows_are_dealt_evenly_and_rows_as_chunks_are(world: int) -> None:
    dealt = [Ranks(rank, world).deal(7) for rank in range(world)]
    assert {len(each) for each in dealt} == {-(-7 // world)}
    assert torch.cat(dealt)[:7].tolist() == list(range(7))
    for count in (2, 7, 10):
        rows = torch.arange(count)
        chunks = [rows[Ranks(rank, world).rows(count)] for rank in range(world)]
        assert torch.equal(torch.cat(chunks), rows)
        for mine, chunk in zip(chunks, rows.chunk(world), strict=False):
            assert torch.equal(mine, chunk)


def command(model: Path, text: Path, output: Path) -> list[str]:
    options = output.parent / "options.yaml"
    options.write_text("validation_windows: 4\nmasks: {refresh_steps: 2}\ndecay: {ramp_share: 0}\n")
    return [
        *["train", str(model), "-o", str(output), "--data", str(text), "--tokens", "1024"],
        *["--preset", "ast", "--length", "32", "--batch-tokens", "128", "--learning-rate", "0.003"],
        *["--dtype", "float32", "--device", "cpu", "--options", str(options), "--json"],
    ]


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.slow
def test_torchrun_gives_the_result_of_one_process(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = tmp_path / "a" / "out", tmp_path / "b" / "out"
    model = checkpoints("llama")
    alone = run("secateur", *command(model, text_file, one))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "secateur"]
    together = run(*launcher, *command(model, text_file, two))
    assert together["steps"] == alone["steps"] == 8
    assert together["validation"]["after"] == pytest.approx(alone["validation"]["after"], rel=1e-4)
    assert together["sparsity"] == alone["sparsity"]
    for path in sorted(one.rglob("*.safetensors")):
        first, second = load_file(path), load_file(two / path.relative_to(one))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            if "masks" in path.parts or not tensor.is_floating_point():
                assert torch.equal(tensor, second[name])
            else:
                torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)
