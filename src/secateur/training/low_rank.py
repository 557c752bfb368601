"""SLoRB: a low-rank product beside a sparse linear, which begins as the mean of what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.runs.errors import SecateurError


class LowRank(nn.Module):
    """S·(X·x), as a LoRA adapter has it: S is its ``lora_B``, X its ``lora_A``, scale 1.

    Attributes:
        x_RI: sums groups of consecutive inputs at the start (AST, section 4.3).
        s_OR: mean of the removed weights of each group at the start.
    """

    def __init__(self, removed_OI: Tensor, group: int, *, train_projection: bool) -> None:
        super().__init__()
        width = removed_OI.shape[1]
        check_group(width, group)
        x_RI = torch.eye(width // group, device=removed_OI.device).repeat_interleave(group, 1)
        self.x_RI = nn.Parameter(x_RI, requires_grad=train_projection)
        self.s_OR = nn.Parameter(removed_OI.unflatten(1, (-1, group)).mean(2))

    @torch.no_grad()
    def begin_with(self, s_OR: Tensor, x_RI: Tensor) -> None:
        """Take other factors of the same shapes."""
        self.s_OR.copy_(s_OR)
        self.x_RI.copy_(x_RI)

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of products."""
        return functional.linear(functional.linear(x, self.x_RI), self.s_OR)


def check_group(width: int, group: int) -> None:
    """Raise SecateurError if rows of ``width`` columns cannot be cut into the boost's groups."""
    if width % group:
        raise SecateurError(
            f"a low-rank boost of one rank per {group} columns needs a width divisible by {group}, "
            f"but the width is {width}; choose another group"
        )


def adapter_files(boosts: Mapping[str, LowRank]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The boosts, by full linear name, as ``adapter_config.json`` and tensors in PEFT's format.

    Merging them into the weights would fill every zero, so they are saved beside the checkpoint;
    ``PeftModel.from_pretrained(model, FOLDER)`` and servers that know LoRA put them back.
    """
    ranks = {name: boost.s_OR.shape[1] for name, boost in boosts.items()}
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(boosts),
    }
    tensors = {}
    for name, boost in boosts.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = boost.x_RI.data
        tensors[f"{prefix}.lora_B.weight"] = boost.s_OR.data
    return config, tensors
