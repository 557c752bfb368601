"""Tokens per second of a dense checkpoint and of smaller ones, with transformers, in turn.

    python benchmarks/speed.py MODEL SMALLER [SMALLER ...]

Prefill is 512 tokens through the blocks, without the head, which is as large as it was; decoding
is 64 tokens by the whole model. bfloat16, one warm-up, the median of seven.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from costs import timed

PREFILL, NEW, REPEATS = 512, 64, 7


@torch.no_grad()
def main() -> None:
    # Checkpoints with a width for each block bring code of their own.
    load = partial(
        AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16, trust_remote_code=True
    )
    models = {folder: load(folder).eval() for folder in sys.argv[1:]}
    ids = torch.arange(PREFILL).unsqueeze(0) % next(iter(models.values())).config.vocab_size
    few = {"input_ids": ids[:, :8], "attention_mask": torch.ones_like(ids[:, :8])}

    def prefill(model: Any) -> None:
        model.base_model(input_ids=ids, use_cache=False)

    def decode(model: Any) -> None:
        model.generate(**few, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)

    print("| checkpoint | prefill | / dense | decoding | / dense |\n|---|---:|---:|---:|---:|")
    speeds: dict[str, list[float]] = {folder: [] for folder in models}
    for run, tokens in ((prefill, PREFILL), (decode, NEW)):
        seconds: dict[str, list[float]] = {folder: [] for folder in models}
        for _ in range(REPEATS + 1):
            for folder, model in models.items():
                seconds[folder].append(timed(partial(run, model), ids.device))
        for folder, each in seconds.items():
            speeds[folder].append(tokens / statistics.median(each[1:]))
    dense = speeds[sys.argv[1]]
    for folder, found in speeds.items():
        cells = [f"{a:.1f} | {a / b:.2f}" for a, b in zip(found, dense, strict=True)]
        print(f"| {folder} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
