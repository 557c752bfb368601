"""Estimates follow the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from secateur.estimation.estimate import estimate
from secateur.pruning.recipe import Recipe


def test_block_stages_cost_streams_copies_and_passes(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints("llama")

    def of(*stages: dict[str, object]):  # type: ignore[no-untyped-def]
        calibration = {"samples": 16, "length": 32}
        return estimate(
            folder, Recipe.from_mapping({"stages": list(stages), "calibration": calibration})
        )

    wanda = of({"method": "wanda"})
    short = of({"method": "wanda"}, {"method": "reconstruct", "epochs": 1})
    long = of({"method": "wanda"}, {"method": "reconstruct", "epochs": 3})
    both = of({"method": "besa"}, {"method": "reconstruct"})
    assert short.activation_bytes == long.activation_bytes == 2 * wanda.activation_bytes
    assert both.activation_bytes == 3 * wanda.activation_bytes
    assert long.forward_flops > short.forward_flops > wanda.forward_flops
    rebuilt = of({"method": "wanda"}, {"method": "swaps"}, {"method": "refit"})
    refitted = of({"method": "wanda"}, {"method": "refit"})
    assert rebuilt.forward_flops > refitted.forward_flops
    tokens, epochs = 12 * 32, 2
    assert long.forward_flops - short.forward_flops == 2 * wanda.weights * tokens * 3 * epochs


def test_what_is_held_out_is_not_fitted_on(checkpoints: Callable[..., Path]) -> None:
    def flops(held_out: int | None) -> float:
        values = {
            "stages": [{"method": "wanda"}, {"method": "reconstruct"}],
            "calibration": {"samples": 16, "length": 32},
            "held_out": held_out,
        }
        return estimate(checkpoints("llama"), Recipe.from_mapping(values)).forward_flops

    assert flops(2) > flops(None) == flops(4)


def test_measuring_an_allocation_is_work(checkpoints: Callable[..., Path]) -> None:
    def flops(allocation: dict[str, object]) -> float:
        values = {"calibration": {"samples": 16, "length": 32}, "allocation": allocation}
        return estimate(checkpoints("llama"), Recipe.from_mapping(values)).forward_flops

    uniform, owl = flops({"method": "uniform"}), flops({"method": "owl", "sequences": 4})
    probed = flops({"method": "sensitivity", "sequences": 4})
    assert uniform < owl < probed
