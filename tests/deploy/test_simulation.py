"""Cycles of checkpoints, counted in their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.deploy.accelerator import Formula
from secateur.deploy.simulation import kept_per_column
from tiny import make_checkpoint

# Tiny linears fill more than a cycle of this one.
SMALL = secateur.Accelerator(width=4, height=2)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_nonzeros_are_counted_in_every_column(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randint(1, 100, (600, 300), generator=generator).to(dtype)
    weight_OI[torch.rand(600, 300, generator=generator) < 0.4] = 0
    weight_OI[:, 7] = 3
    weight_OI[:, 8] = -0.0 if dtype.is_floating_point else 0
    weight_OI[0, 9] = torch.tensor(1e-7).to(dtype)
    weight_OI = weight_OI.T if transposed else weight_OI
    assert kept_per_column(weight_OI).tolist() == (weight_OI != 0).sum(0).tolist()


def test_dense_checkpoint_gains_nothing(checkpoints: Callable[..., Path]) -> None:
    simulation = secateur.simulate(checkpoints("llama"), SMALL)
    for formula in Formula:
        assert all(
            linear.cycles[formula].dense == linear.cycles[formula].pruned
            for linear in simulation.linears
        )
        assert simulation.total.cycles[formula].speed_up == 1
    q_proj, *_, down_proj = simulation.projections
    assert (q_proj.name, q_proj.linears) == ("self_attn.q_proj", 3)
    assert q_proj.cycles[Formula.CORRECTED].dense == 3 * 32 * 32 // 8
    assert (down_proj.name, down_proj.linears) == ("mlp.down_proj", 3)
    assert down_proj.cycles[Formula.CORRECTED].dense == 3 * 32 * 64 // 8
    assert simulation.total.weights == sum(each.weights for each in simulation.projections)


@pytest.mark.parametrize(
    ("family", "name", "projection"),
    [
        ("llama", "model.layers.1.mlp.down_proj", "mlp.down_proj"),
        ("gpt2", "transformer.h.1.mlp.c_proj", "mlp.c_proj"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.2.w1",
            "block_sparse_moe.experts.*.w1",
        ),
    ],
)
def test_zeros_shorten_their_own_linear(
    family: str, name: str, projection: str, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path / "model")
    dense = secateur.simulate(tmp_path / "model", SMALL)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    # GPT-2 stores (in, out): input columns are the first dimension of its file.
    stored = tensors[f"{name}.weight"]
    (stored.T if family == "gpt2" else stored)[:, ::4] = 0
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})

    simulation = secateur.simulate(tmp_path / "model", SMALL)
    inspection = secateur.inspect(tmp_path / "model")
    assert simulation.total.zeros == inspection.zeros
    for before, linear in zip(dense.linears, simulation.linears, strict=True):
        counted = linear.cycles[Formula.CORRECTED]
        if linear.name == name:
            assert linear.projection == projection
            # Whole columns are dropped, so nothing is lost in dividing the array.
            assert counted.pruned * 4 == counted.dense * 3
        else:
            assert linear == before


def test_linear_without_weights_takes_no_cycles(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.k_proj.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    simulation = secateur.simulate(tmp_path / "model")
    empty = next(linear for linear in simulation.linears if linear.rows * 32 == linear.zeros)
    assert empty.name == "model.layers.0.self_attn.k_proj"
    assert empty.cycles[Formula.CORRECTED].pruned == 0
    assert empty.cycles[Formula.CORRECTED].speed_up is None
