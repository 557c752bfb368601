"""Prune a model with llm-compressor, from a folder on disk to a folder on disk.

Runs inside the contender's own environment (`requirements-peers.txt`) and imports nothing of
secateur. Everything that the protocol does not set stays at the tool's default: its sequential
pipeline, one sequence per batch, the weights' own dtype.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
DECODER_LAYERS = r"re:model\.layers\.\d+$"


def mask_structure(pattern: str | None) -> str:
    """Its n:m counts the weights removed of every m, ours the weights kept; 0:0 is unstructured."""
    if pattern is None:
        return "0:0"
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise ValueError(f"pattern must look like 2:4, got {pattern!r}")
    kept, group = int(match[1]), int(match[2])
    return f"{group - kept}:{group}"


def gptq(bits: int, group: int) -> GPTQModifier:
    """Its GPTQ for symmetric weights, everything else as it comes."""
    weights = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=group)
    return GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with input_ids")
    parser.add_argument("--method", choices=sorted(MODIFIERS), required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", help="n:m, n = kept; overrides --sparsity")
    parser.add_argument("--bits", type=int, help="quantise by GPTQ afterwards, save it packed")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--timing", type=Path, help="where to write seconds per phase as JSON")
    arguments = parser.parse_args()

    times = [time.perf_counter()]
    input_ids = load_file(arguments.tokens)["input_ids"]
    samples, length = input_ids.shape
    dataset = Dataset.from_dict(
        {"input_ids": input_ids.tolist(), "attention_mask": [[1] * length] * samples}
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    times.append(time.perf_counter())

    structure = mask_structure(arguments.pattern)
    removed, group = (int(part) for part in structure.split(":"))
    modifier = MODIFIERS[arguments.method](
        sparsity=removed / group if group else arguments.sparsity,
        mask_structure=structure,
        targets=[DECODER_LAYERS],
        ignore=["re:.*lm_head"],
    )
    recipe = [modifier]
    if arguments.bits is not None:
        recipe.append(gptq(arguments.bits, arguments.group))
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=dataset,
        num_calibration_samples=samples,
        max_seq_length=length,
        shuffle_calibration_samples=False,  # the order is part of the shared token file
        batch_size=arguments.batch_size,
        pipeline="sequential",
    )
    times.append(time.perf_counter())

    model.save_pretrained(arguments.output, save_compressed=arguments.bits is not None)
    tokenizer.save_pretrained(arguments.output)
    times.append(time.perf_counter())

    if arguments.timing is not None:
        phases = ("load", "prune", "save")
        seconds = {name: b - a for name, a, b in zip(phases, times, times[1:], strict=False)}
        arguments.timing.write_text(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
