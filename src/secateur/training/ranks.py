"""The processes of a run: each takes its windows of a step, and gradients are added up."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from secateur.errors import SecateurError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; one alone by default.

    Attributes:
        rank: number of this process.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, windows: int) -> slice:
        """The windows of a step that are this process's; consecutive, and as many for each.

        Raises:
            SecateurError: there are fewer windows than processes.
        """
        if windows < self.world:
            raise SecateurError(
                f"A step of {windows} windows cannot be divided among {self.world} processes; "
                "give more --batch-tokens, or start fewer processes."
            )
        return slice(windows * self.rank // self.world, windows * (self.rank + 1) // self.world)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            distributed.barrier()

    def in_turn(self) -> Iterator[bool]:
        """Yield for every process in turn whether it is this one; all wait for each other."""
        for rank in range(self.world):
            yield rank == self.rank
            self.wait()


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that ``torchrun`` started, and give each its own device of that kind."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # While the first process prunes or tokenises, the others wait.
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7)
    )
    try:
        yield Ranks(distributed.get_rank(), world), device
    finally:
        distributed.destroy_process_group()
