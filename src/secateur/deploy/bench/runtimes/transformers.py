"""Folders of safetensors in transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.deploy.bench.runtimes.runtime import Opened, Session, Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class Transformers:
    """The models' own classes, run by PyTorch."""

    name = "transformers"
    package = "transformers"
    module = "transformers"
    extra = ""

    def reads(self, path: Path) -> bool:
        return path.is_dir() and any(path.glob("*.safetensors*"))

    def check(self, path: Path, settings: Settings) -> Opened:
        from secateur.models.checkpoint import Checkpoint
        from secateur.models.files import find_weights
        from secateur.runs.device import resolve_device, resolve_dtype

        # Loading builds whatever the configuration says, however large.
        found = Checkpoint.at(path, trust_remote_code=settings.trust_remote_code, use="load")
        device = resolve_device(settings.device)
        dtype = resolve_dtype(settings.dtype, device)
        text = found.blocks.model.config.get_text_config()
        files = find_weights(path).names
        return Opened(
            form=str(dtype).removeprefix("torch."),
            device=_name(device),
            file_bytes=sum((path / name).stat().st_size for name in files),
            memory_bytes=dtype.itemsize * sum(map(prod, found.reader.shapes.values())),
            token_bytes=dtype.itemsize * _numbers_of_a_token(text),
            vocabulary=text.vocab_size,
            positions=getattr(text, "max_position_embeddings", None),
        )

    def load(self, path: Path, settings: Settings) -> Session:
        import torch

        from secateur.models.locate import open_model
        from secateur.runs.device import resolve_device, resolve_dtype

        torch.set_num_threads(settings.threads)
        device = resolve_device(settings.device)
        return _Loaded(
            open_model(
                path,
                resolve_dtype(settings.dtype, device),
                device,
                trust_remote_code=settings.trust_remote_code,
            )
        )


class _Loaded:
    kernel = ""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Every sequence gets all its tokens, whatever they are.
        model.generation_config.eos_token_id = None

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, started: Callable[[], None]
    ) -> int:
        import torch
        from transformers.generation.streamers import BaseStreamer

        device = self.model.device

        class Starts(BaseStreamer):
            """Is handed the prompts, then the tokens of every step."""

            parts = 0

            def put(self, value: torch.Tensor) -> None:
                self.parts += 1
                if self.parts == 2:
                    started()

            def end(self) -> None:
                pass

        tokens_BL = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            out_BL: Any = self.model.generate(  # type: ignore[operator]
                tokens_BL,
                attention_mask=torch.ones_like(tokens_BL),
                do_sample=False,
                num_beams=1,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
                use_cache=True,
                streamer=Starts(),
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return int((out_BL.shape[1] - tokens_BL.shape[1]) * len(tokens_BL))

    def close(self) -> None:
        del self.model


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _numbers_of_a_token(config: PreTrainedConfig) -> int:
    """What a token needs: keys and values of all blocks, and the widest part of one block."""
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    groups = int(getattr(config, "num_key_value_heads", 0) or heads)
    size = int(getattr(config, "head_dim", 0) or (hidden // heads if heads else 0))
    widest = getattr(config, "intermediate_size", 0) or 0
    widest = max(widest) if isinstance(widest, list | tuple) else int(widest)
    return 2 * groups * size * int(config.num_hidden_layers) + 4 * (hidden + widest)
