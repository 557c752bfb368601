"""Baselines of structured pruning: Wanda-sp and FLAP, from a checkpoint to a smaller one.

    python benchmarks/peers/structured.py flap MODEL OUTPUT --sparsity 0.3 --calibration c4.jsonl

Wanda-sp removes the units with the lowest mean of |W_ij| · √mean(x_j²), the same number in every
block. FLAP (An et al. 2023, arXiv 2312.11983) scores channels by Var(x_j) · ‖W_j‖², standardises
the scores of each sub-block, removes the lowest over the whole model, and puts what removed
channels gave on average into a bias of the output; a Llama without biases is given zero ones first.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from secateur.evaluation.scores import score_windows
from secateur.models.structure import BlockList
from secateur.models.text_path import find_blocks
from secateur.shrinking.bonsai import InputMoments, observed_moments
from secateur.shrinking.export import as_they_were, export
from secateur.shrinking.layout import plan_layout, uniform_widths
from secateur.shrinking.source import open_source
from secateur.shrinking.units import (
    SubBlock,
    block_parameters,
    find_sub_blocks,
)
from secateur.solvers.ridge import output_bias
from secateur.solvers.scores import fluctuation_columns, unit_means, wanda_columns
from secateur.text.calibration import load_calibration
from secateur.text.options import CalibrationOptions


@dataclass(frozen=True)
class Seen:
    """A sub-block, its output matrix in fp32 and what enters it."""

    sub_block: SubBlock
    weight_OI: Tensor
    moments: InputMoments

    @property
    def variance_I(self) -> Tensor:
        return (self.moments.square_I - self.moments.mean_I.square()).clamp_min(0)


def look(model_folder: Path, arguments: argparse.Namespace) -> list[Seen]:
    """Run the dense model over the calibration text."""
    options = CalibrationOptions(
        source=arguments.calibration,
        samples=arguments.samples,
        length=arguments.length,
        seed=arguments.seed,
    )
    tokens_SL = load_calibration(options, AutoTokenizer.from_pretrained(model_folder)).tokens
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    blocks: BlockList = find_blocks(model)
    sub_blocks = find_sub_blocks(blocks)
    with observed_moments(blocks, sub_blocks) as moments:
        score_windows(model, tokens_SL, dtype=torch.bfloat16)
    return [
        Seen(each, each.output_linear(blocks[each.block]).weight_OI.float(), moment)
        for each, moment in zip(sub_blocks, moments(), strict=True)
    ]


def lowest_everywhere(seen: Sequence[Seen], counts: Sequence[int]) -> list[Tensor]:
    """Keep so many units of each sub-block, those with the highest Wanda scores."""
    kept = []
    for each, count in zip(seen, counts, strict=True):
        score_I = wanda_columns(each.weight_OI, each.moments.square_I)
        score_U = unit_means(score_I, each.sub_block.columns_UP.shape[1])
        kept.append(score_U.topk(count).indices.sort().values)
    return kept


def lowest_anywhere(seen: Sequence[Seen], costs: Sequence[int], budget: int) -> list[Tensor]:
    """Remove the lowest standardised fluctuations of the model, as many as the budget holds."""
    scores = []
    for each in seen:
        score_I = fluctuation_columns(each.weight_OI, each.variance_I)
        score_I = (score_I - score_I.mean()) / score_I.std()
        scores.append(unit_means(score_I, each.sub_block.columns_UP.shape[1]))
    sizes = [len(score_U) for score_U in scores]
    order_M = torch.cat(scores).argsort()
    cost_M = torch.tensor(costs).repeat_interleave(torch.tensor(sizes))[order_M]
    gone_M = torch.zeros(len(order_M), dtype=torch.bool)
    gone_M[order_M[cost_M.cumsum(0) <= budget]] = True
    return [(~gone_U).nonzero().flatten() for gone_U in gone_M.split(sizes)]


def mean_biases(seen: Sequence[Seen], kept: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """By block, the output biases that make up for the mean of what removed units gave."""
    biases: list[dict[str, Tensor]] = [{} for _ in range(seen[-1].sub_block.block + 1)]
    for each, units in zip(seen, kept, strict=True):
        columns_K = each.sub_block.columns(units)
        plain_OK = each.weight_OI[:, columns_K]
        bias_O = output_bias(each.weight_OI, plain_OK, columns_K, each.moments.mean_I)
        biases[each.sub_block.block][f"{each.sub_block.output}.bias"] = bias_O
    return biases


def with_biases(model: Path, folder: Path) -> Path:
    """Save a Llama with biases that are zero; the same network."""
    dense = AutoModelForCausalLM.from_pretrained(model)
    config = dense.config
    if not isinstance(dense, LlamaForCausalLM):
        raise SystemExit("FLAP's bias is put into Llamas alone.")
    config.attention_bias = config.mlp_bias = True
    biased = LlamaForCausalLM(config).to(dense.dtype)
    state = {name: torch.zeros_like(tensor) for name, tensor in biased.state_dict().items()}
    biased.load_state_dict(state | dense.state_dict())
    biased.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["wanda-sp", "flap"])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Shares are of the model as it was: a bias is an extra, not something to remove.
    given = open_source(arguments.model).blocks
    total = block_parameters(given)
    counted = find_sub_blocks(given)
    with tempfile.TemporaryDirectory() as folder:
        budget = round(arguments.sparsity * total)
        flap = arguments.method == "flap"
        dense = with_biases(arguments.model, Path(folder)) if flap else arguments.model
        source = open_source(dense)
        seen = look(dense, arguments)
        sub_blocks = [each.sub_block for each in seen]
        refitted = as_they_were
        if flap:
            kept = lowest_anywhere(seen, [each.unit_parameters for each in counted], budget)
            biases = mean_biases(seen, kept)

            def refitted(index: int) -> Mapping[str, Tensor]:
                return biases[index]

        else:
            common = uniform_widths(
                source, sub_blocks, budget, arguments.sparsity, whole_groups=True
            )
            kept = lowest_everywhere(seen, [width.units for width in common])
        widths = [each.width_of(units) for each, units in zip(sub_blocks, kept, strict=True)]
        layout = plan_layout(source, sub_blocks, widths, "uneven")
        export(source, sub_blocks, kept, layout, arguments.output, refitted)


if __name__ == "__main__":
    main()
