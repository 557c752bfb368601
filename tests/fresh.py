"""What saved models return in a process that knows nothing of secateur."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

IDS = torch.arange(4, 36).unsqueeze(0)

_LOAD = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
logits = {}
for name, folder in json.load(open(sys.argv[1])).items():
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits[name] = model(torch.arange(4, 36).unsqueeze(0)).logits.float().contiguous()
save_file(logits, sys.argv[2])
"""


def logits_of(folders: Mapping[str, Path], scratch: Path) -> dict[str, Tensor]:
    """Logits for ``IDS`` of each checkpoint, by the name given to its folder."""
    (scratch / "folders.json").write_text(json.dumps({k: str(v) for k, v in folders.items()}))
    subprocess.run(
        [sys.executable, "-c", _LOAD, scratch / "folders.json", scratch / "logits.safetensors"],
        check=True,
        capture_output=True,
    )
    return load_file(scratch / "logits.safetensors")
