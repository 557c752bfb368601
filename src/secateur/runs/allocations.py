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
    with _counted(), profile(use_kineto=True, profile_memory=True) as recorded:
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
def _counted() -> Iterator[None]:
    """Allocations of other threads are not seen, so transformers loads weights in this one."""
    # The second name keeps the profiler's library from writing to the terminal.
    wanted = {"HF_DEACTIVATE_ASYNC_LOAD": "1", "KINETO_LOG_LEVEL": "99"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
