"""SLoRB: what it begins with, what it costs, how it is saved."""

from __future__ import annotations

import pytest
import torch

from secateur.runs.errors import SecateurError
from secateur.training.low_rank import SLoRB
from secateur.training.saving import adapter_files


def test_it_restores_the_mean_of_every_group() -> None:
    torch.manual_seed(0)
    w_OI, mask_OI = torch.randn(6, 32), torch.rand(6, 32) > 0.5
    boost = SLoRB(w_OI * ~mask_OI, 8, train_projection=True)
    whole_OI = w_OI * mask_OI + boost.s_OR.data @ boost.x_RI.data
    torch.testing.assert_close(whole_OI.view(6, 4, 8).mean(2), w_OI.view(6, 4, 8).mean(2))


def test_nothing_removed_adds_nothing() -> None:
    boost = SLoRB(torch.zeros(6, 32), 8, train_projection=True)
    assert not bool(boost(torch.randn(3, 32)).any())


@pytest.mark.parametrize("train_projection", [True, False])
def test_parameters_are_counted(train_projection: bool) -> None:
    boost = SLoRB(torch.randn(6, 32), 8, train_projection=train_projection)
    trained = sum(p.numel() for p in boost.parameters() if p.requires_grad)
    assert trained == 6 * 4 + (32 * 4 if train_projection else 0)


def test_group_must_divide_the_width() -> None:
    with pytest.raises(SecateurError, match="divisible by 5"):
        SLoRB(torch.zeros(6, 32), 5, train_projection=True)


def test_adapter_holds_the_product() -> None:
    boosts = {
        "model.layers.0.up": SLoRB(torch.randn(6, 32), 8, train_projection=True),
        "model.layers.0.down": SLoRB(torch.randn(32, 64), 8, train_projection=True),
    }
    config, tensors = adapter_files(boosts)
    for name, boost in boosts.items():
        rank = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        a_RI = tensors[f"base_model.model.{name}.lora_A.weight"]
        b_OR = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert a_RI.shape[0] == rank
        x_NI = torch.randn(3, a_RI.shape[1])
        # PEFT scales by alpha / rank.
        torch.testing.assert_close(alpha / rank * (x_NI @ a_RI.T @ b_OR.T), boost(x_NI))
    assert sorted(config["target_modules"]) == sorted(boosts)
