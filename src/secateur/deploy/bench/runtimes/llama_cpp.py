"""GGUF files in llama.cpp, through its own server inside of the process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.deploy.bench.runtimes.runtime import Opened, Session, Settings
from secateur.models.gguf_header import read_gguf_header

# Contexts are multiples of this many tokens.
_CONTEXT = 256


class LlamaCpp:
    """llama.cpp, as the package xllamacpp brings it."""

    name = "llama.cpp"
    package = "xllamacpp"
    module = "xllamacpp"
    extra = "llama"

    def reads(self, path: Path) -> bool:
        return path.suffix == ".gguf"

    def check(self, path: Path, settings: Settings) -> Opened:
        header = read_gguf_header(path)
        groups = header.number("attention.head_count_kv") or header.number("attention.head_count")
        size = header.number("attention.key_length") or (
            header.number("embedding_length") // max(1, header.number("attention.head_count"))
        )
        file_bytes = path.stat().st_size
        return Opened(
            form=header.form,
            device="cpu",
            file_bytes=file_bytes,
            memory_bytes=file_bytes,
            # Keys and values in 16 bits.
            token_bytes=4 * groups * size * header.number("block_count"),
            vocabulary=header.vocabulary or header.number("vocab_size"),
            positions=header.number("context_length") or None,
        )

    def load(self, path: Path, settings: Settings) -> Session:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = settings.batch
        params.n_ctx = settings.batch * -(-settings.length // _CONTEXT) * _CONTEXT
        params.cpuparams.n_threads = settings.threads
        params.cpuparams_batch.n_threads = settings.threads
        params.n_gpu_layers = 0
        # Each turn computes its prompts anew, and prompts that fit start together.
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.n_ctx_checkpoints = 0
        params.kv_unified = False
        params.fit_params = False
        return _Loaded(xllamacpp.Server(params))


class _Loaded:
    kernel = ""

    def __init__(self, server: Any) -> None:
        self.server = server

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, started: Callable[[], None]
    ) -> int:
        begun: set[int] = set()
        written = 0

        def hear(part: Any) -> None:
            nonlocal written
            if not part:
                # Nothing new, the server is asking whether to go on.
                return
            if "error" in part:
                raise RuntimeError(part["error"].get("message", "llama.cpp refused"))
            (choice,) = part["choices"]
            if choice["index"] not in begun:
                begun.add(choice["index"])
                if len(begun) == len(prompts):
                    started()
            if choice["finish_reason"]:
                written += part["usage"]["completion_tokens"]

        self.server.handle_completions(
            {
                "prompt": [list(prompt) for prompt in prompts],
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
                "samplers": ["temperature"],
                "cache_prompt": False,
                "stream": True,
            },
            hear,
        )
        return written

    def close(self) -> None:
        del self.server
