"""Run a function in several processes at once, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

# One process imports everything, and all others come from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["secateur.training.train", "transformers"])


def together(world: int, function: Callable[..., None], *arguments: object) -> list[int | None]:
    """Call a function of a module in every process; returns how they ended, 0 if all went well."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=_join, args=(rank, world, port, function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _join(
    rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    function(*arguments)
