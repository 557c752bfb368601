"""Prune a model with llm-compressor, from a folder on disk to a folder on disk.

Runs inside the contender's own environment (`requirements-peers.txt`) and imports nothing of
secateur. Everything that the protocol does not set stays at the tool's default: its sequential
pipeline, one sequence per batch, the weights' own dtype.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--pattern", default="0.5", help="a sparsity, or n:m, n = kept")
    parser.add_argument("--bits", type=int, help="quantise by GPTQ afterwards, save it packed")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale")
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()

    input_ids = load_file(arguments.tokens)["input_ids"]
    samples, length = input_ids.shape
    dataset = Dataset.from_dict(
        {"input_ids": input_ids.tolist(), "attention_mask": [[1] * length] * samples}
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    kept, _, group = arguments.pattern.partition(":")
    # Its n:m counts the weights that are removed of every m; 0:0 is unstructured.
    removed = int(group) - int(kept) if group else 0
    modifier = MODIFIERS[arguments.method](
        sparsity=removed / int(group) if group else float(kept),
        mask_structure=f"{removed}:{group or 0}",
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

    model.save_pretrained(arguments.output, save_compressed=arguments.bits is not None)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
