"""Folders with an OpenVINO model that keeps keys and values itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from secateur.deploy.bench.runtimes.runtime import Opened, Session, Settings
from secateur.runs.errors import SecateurError, explained

XML = "openvino_model.xml"
# The inputs that are given; beam_idx says which sequence each one goes on from.
_INPUTS = {"input_ids", "attention_mask", "position_ids", "beam_idx"}


class OpenVino:
    """OpenVINO's plugin for the CPU, with models as ``export`` and optimum-intel write them."""

    name = "openvino"
    package = "openvino"
    module = "openvino"
    extra = "openvino"

    def reads(self, path: Path) -> bool:
        return path.is_dir() and (path / XML).is_file()

    def check(self, path: Path, settings: Settings) -> Opened:
        xml = path / XML
        weights = xml.with_suffix(".bin")
        if not weights.is_file():
            raise SecateurError(f"{weights} is missing; export the model again.")
        inputs, forms, end = set[str](), dict[str, int](), 0
        stateful = False
        with explained(f"{xml} cannot be read as an OpenVINO model", "export the model again."):
            for layer in ElementTree.parse(xml).getroot().iter("layer"):
                data = layer.find("data")
                if layer.get("type") == "Parameter":
                    inputs |= set((layer.get("name") or "").split())
                    inputs |= {
                        name
                        for port in layer.iter("port")
                        for name in (port.get("names") or "").split(",")
                        if name in _INPUTS
                    }
                if layer.get("type") == "ReadValue":
                    stateful = True
                if layer.get("type") == "Const" and data is not None:
                    size, form = int(data.get("size", 0)), data.get("element_type", "?")
                    forms[form] = forms.get(form, 0) + size
                    end = max(end, int(data.get("offset", 0)) + size)
        if "input_ids" not in inputs or not stateful:
            raise SecateurError(
                f"{xml} does not take input_ids and keep keys and values itself, so writing cannot "
                "be timed; export it with a stateful cache."
            )
        size = weights.stat().st_size
        if size < end:
            raise SecateurError(
                f"{weights} has {size:,} bytes, and the model needs {end:,}; export it again."
            )
        vocabulary, positions = _sizes(path)
        return Opened(
            form=max(forms, key=forms.__getitem__, default="?"),
            device="cpu",
            file_bytes=size + xml.stat().st_size,
            memory_bytes=size,
            token_bytes=0,
            vocabulary=vocabulary,
            positions=positions,
        )

    def load(self, path: Path, settings: Settings) -> Session:
        import openvino

        compiled = openvino.Core().compile_model(
            path / XML,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": settings.threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                # With AMX and integers, matrices with as many zeros as this are kept packed.
                "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5,
            },
        )
        return _Loaded(compiled)


class _Loaded:
    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.inputs = {name for each in compiled.inputs for name in each.names} & _INPUTS

    @property
    def kernel(self) -> str:
        """It depends on the processor, and on zeros where AMX is; chosen when inputs are known."""
        found: Counter[str] = Counter()
        for node in self.request.get_compiled_model().get_runtime_model().get_ops():
            facts = {key: str(value.value) for key, value in node.get_rt_info().items()}
            if facts.get("layerType", "").startswith("FullyConnected"):
                found[facts.get("primitiveType", "")] += 1
        return found.most_common(1)[0][0] if found else ""

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, started: Callable[[], None]
    ) -> int:
        self.request.reset_state()
        next_BL = np.array(prompts, np.int64)
        batch, seen = len(next_BL), 0
        for step in range(tokens):
            values = inputs_of(next_BL, seen)
            seen += next_BL.shape[1]
            self.request.infer({name: values[name] for name in self.inputs})
            logits_BLV = self.request.get_output_tensor(0).data
            next_BL = logits_BLV[:, -1:].argmax(-1).astype(np.int64)
            if step == 0:
                started()
        return batch * tokens

    def close(self) -> None:
        del self.request


def inputs_of(ids_BL: NDArray[np.int64], seen: int) -> dict[str, NDArray[Any]]:
    """Inputs of one step of a model that keeps keys and values of ``seen`` tokens before.

    Args:
        ids_BL: int64 (batch, tokens), which go on from sequences in the same order.
        seen: tokens of each sequence so far.
    """
    batch, length = ids_BL.shape
    positions_BL = np.broadcast_to(np.arange(seen, seen + length), (batch, length))
    return {
        "input_ids": ids_BL,
        "attention_mask": np.ones((batch, seen + length), np.int64),
        "position_ids": np.ascontiguousarray(positions_BL),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }


def _sizes(folder: Path) -> tuple[int, int | None]:
    """Vocabulary and positions, as the configuration beside the model says."""
    path = folder / "config.json"
    with explained(f"{path} cannot be read", "export the model again."):
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        return int(config["vocab_size"]), config.get("max_position_embeddings")
