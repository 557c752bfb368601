"""Every command that writes, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from tiny import make_checkpoint

Words = Callable[[Path], list[object]]


@dataclass(frozen=True)
class World:
    """Inputs that all commands share.

    Attributes:
        root: folder of everything.
        commands: words of each command line, given its output folder, by name.
    """

    root: Path
    commands: dict[str, Words]


def make_world(root: Path, text: Path) -> World:
    """Make the models and say what to do with them."""
    for family in ("llama", "mixtral", "gpt2"):
        make_checkpoint(family, root / family)
    llama, mixtral, gpt2 = root / "llama", root / "mixtral", root / "gpt2"
    common = ["--samples", "8", "--length", "32", "--device", "cpu", "--dtype", "float32"]
    calibration = ["--calibration", text, *common]

    def options(name: str, values: dict[str, object]) -> Path:
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def prune(model: Path, *words: object) -> Words:
        return lambda output: ["prune", model, "--output", output, *calibration, *words]

    def shrink(model: Path, *words: object) -> Words:
        return lambda output: ["shrink", model, "--output", output, *calibration, *words]

    short = {"tokens": 1024, "length": 32, "batch_tokens": 64, "validation_windows": 2}
    short |= {"checkpoint_minutes": 1e-6, "device": "cpu", "dtype": "float32"}
    learned = options(
        "learned",
        {
            "pattern": "0.5",
            "stages": [{"method": "besa", "epochs": 1}, {"method": "reconstruct", "epochs": 1}],
            "allocation": "loss",
            "calibration": {"source": str(text), "samples": 8, "length": 32},
            "device": "cpu",
            "dtype": "float32",
        },
    )
    trained = options("trained", short)
    adaptive = options("adaptive", short | {"distillation": {"top_k": 8}})
    recovered = options(
        "recovered", {**short, "tokens": 512, "blocks": {"epochs": 1}, "block_windows": 8}
    )
    return World(
        root,
        {
            "prune": prune(llama, "--method", "sparsegpt", "--refit", "--pattern", "2:4"),
            "prune learned": lambda output: ["prune", llama, "-o", output, "--recipe", learned],
            "prune rebuilt": prune(llama, "--method", "wanda", "--rebuild", "barber"),
            "prune packed": prune(
                llama, "--method", "wanda", "--quantize", "int4", "--quantize-group", "16"
            ),
            "prune mixture": prune(mixtral, "--method", "wanda", "--refit"),
            "prune self": lambda output: ["prune", gpt2, "-o", output, *common],
            "shrink": shrink(llama, "--sparsity", "0.3", "--sub-models", "8"),
            "shrink paper": shrink(llama, "--preset", "paper", "--masks", "60", "--step", "0.2"),
            "curve": shrink(llama, "--curve", "--sub-models", "8"),
            "train": lambda output: [
                *("train", llama, "-o", output, "--data", text, "--options", trained),
            ],
            "train adaptive": lambda output: [
                *("train", llama, "-o", output, "--data", text, "--options", adaptive),
                *("--preset", "ast", "--low-rank", "16"),
            ],
            "recover": lambda output: [
                *("recover", root / "small", "-o", output, "--data", text),
                *("--teacher", llama, "--options", recovered, "--trust-remote-code"),
            ],
        },
    )
