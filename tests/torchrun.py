"""Train in several processes at once, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from secateur.patterns.pattern import check_mask
from secateur.runs.progress import silent
from secateur.training.job import taken
from secateur.training.loading import load_student
from secateur.training.options import Training
from secateur.training.ranks import joined
from secateur.training.train import train
from secateur.training.trainer import Trainer

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
        while process.is_alive() and not any(each.exitcode for each in processes):
            process.join(0.2)
    # One that ended badly may leave the others waiting for it.
    for process in processes:
        process.join(20)
        process.kill()
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


def run(source: Path, text: Path, output: Path, chosen: Training, kill_at: int = 0) -> None:
    """Train; ``kill_at`` ends the process after so many steps, by the signal nothing can catch."""
    step = Trainer.step

    def killing(trainer: Trainer) -> None:
        step(trainer)
        if trainer.done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.step = killing  # type: ignore[method-assign]
    try:
        train(source, chosen, output, data=[str(text)])
    finally:
        Trainer.step = step  # type: ignore[method-assign]


def check_parts(source: Path, text: Path, output: Path, chosen: Training) -> None:
    """In every process: it has its share of everything, and no group or row is split."""
    with joined(torch.device("cpu")) as (ranks, device), ExitStack() as held:
        for mine in ranks.in_turn():
            if mine:
                job = held.enter_context(
                    taken(
                        source,
                        chosen,
                        output,
                        data=[str(text)],
                        validation=None,
                        teacher=None,
                        restart=False,
                        trust_remote_code=False,
                        progress=silent,
                        device=device,
                        ranks=ranks,
                    )
                )
        student = load_student(job, source)
        trainer = Trainer(student, None, job.text.train_WL, chosen, job.dtype, ranks)
        trainer.step()
        trainer.step()
        total = sum(parameter.numel() for parameter in student.model.parameters())
        # Rows that do not come out even are padded.
        limit = total // ranks.world * 1.05
        optimiser = trainer.optimiser
        for tensors in (trainer.parameters, optimiser.first, optimiser.second):
            assert sum(t.untyped_storage().nbytes() for t in tensors.values()) <= 4 * limit
        weights = ranks.total(sum(each.mask.numel() for each in trainer.linears))
        held = sum(each.mask.untyped_storage().nbytes() for each in trainer.linears)
        assert held == weights // ranks.world
        for each in trainer.linears:
            check_mask(each.mask_OI, each.rows.budget)
            assert (
                each.mask_OI.shape[1]
                == student.model.get_parameter(f"{each.name}.weight").shape[
                    0 if each.linear.transposed else 1
                ]
            )
