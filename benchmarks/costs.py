"""What a step costs: its wall time, and the bytes of its tensors."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until a call is done, on an accelerator as well."""
    start = _now(device)
    run()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Most memory from the making of a step to the end of its second run.

    The first run makes what lasts, such as the state of an optimiser.
    """
    gc.collect()
    cuda, counter = device.type == "cuda", LiveBytes()
    before = torch.cuda.memory_allocated() if cuda else 0
    with nullcontext() if cuda else counter:
        step = make()
        step()
        gc.collect()
        counter.peak = counter.live
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step()
    return torch.cuda.max_memory_allocated() - before if cuda else counter.peak


class LiveBytes(TorchDispatchMode):
    """Bytes of the CPU tensors made inside it and still alive, and their peak.

    What a kernel uses inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage(), inputs)
        return result

    def _watch(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in inputs:
            return
        size = storage.nbytes()

        def forget(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
