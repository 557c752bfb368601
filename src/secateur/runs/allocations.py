"""How much memory a piece of work takes in tensors, counted by torch's own allocator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._C._profiler import _EventType
from torch.autograd.profiler import profile


def peak_allocation(work: Callable[[], object]) -> int:
    """Run ``work`` and return the most bytes of CPU tensors that it held at a time.

    Temporary memory inside torch's operations counts, files that are mapped do not.
    """
    with _quiet(), profile(use_kineto=True, profile_memory=True) as recorded:
        work()
    assert recorded.kineto_results is not None, "the profiler has stopped"
    changes: list[tuple[int, int]] = []
    mapped: set[int] = set()
    for event, inside in _events(recorded.kineto_results.experimental_event_tree()):
        if event.tag != _EventType.Allocation:
            continue
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        # Files are mapped by no operation; everything else is allocated inside of one.
        if size > 0 and not inside:
            mapped.add(address)
        elif size < 0 and address in mapped:
            mapped.remove(address)
        else:
            changes.append((event.start_time_ns, size))
    held = peak = 0
    for _, size in sorted(changes):
        held += size
        peak = max(peak, held)
    return peak


def _events(roots: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """All events in order of time, each with whether it belongs to an operation."""
    found = [(root, False) for root in roots]
    for event, _ in found:
        found += [(child, True) for child in event.children]
    return iter(sorted(found, key=lambda pair: pair[0].start_time_ns))


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes lines to the terminal unless this says otherwise."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before
