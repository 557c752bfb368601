"""The processes of a run: each takes as many windows of a step as the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from secateur.runs.errors import SecateurError


@dataclass(frozen=True)
class Ranks:
    """Process number ``rank`` of the ``world`` processes of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, windows: int) -> slice:
        """This process's windows of a step, as many as of the others.

        Raises:
            SecateurError: the windows cannot be divided evenly.
        """
        if windows % self.world:
            raise SecateurError(
                f"A step of {windows} windows cannot be divided evenly among {self.world} "
                "processes; give other --batch-tokens, or start another number of processes."
            )
        size = windows // self.world
        return slice(size * self.rank, size * (self.rank + 1))

    def deal(self, windows: int) -> Tensor:
        """Indices of this process's windows; the last is repeated where they are uneven."""
        size = -(-windows // self.world)
        return torch.arange(size * self.rank, size * (self.rank + 1)).clamp_(max=windows - 1)

    def rows(self, count: int) -> slice:
        """The rows of a matrix that are this process's, as ``torch.chunk`` divides them."""
        size = -(-count // self.world)
        return slice(min(size * self.rank, count), min(size * (self.rank + 1), count))

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, in the order of their ranks (world, ...)."""
        if self.world == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        distributed.all_gather(parts, tensor)
        return torch.stack(parts)

    def collect(self, values_W: Tensor, windows: int) -> Tensor:
        """The values of all windows, given those of the ones that were dealt."""
        return self.gather(values_W).flatten()[:windows]

    def agree(self, choice: bool) -> bool:
        """What the first process chose."""
        if self.world == 1:
            return choice
        chosen = torch.tensor([choice], dtype=torch.uint8)
        distributed.broadcast(chosen, 0)
        return bool(chosen)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def total(self, count: int) -> int:
        """The sum of the counts of all processes."""
        counted = torch.tensor(count)
        self.sum([counted])
        return int(counted)

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
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7)
    )
    try:
        with warnings.catch_warnings():
            # What models return may be a view; nothing is written into it.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield Ranks(distributed.get_rank(), world), device
    finally:
        distributed.destroy_process_group()
