"""The steps of a run: done, validated, logged, and saved on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from secateur.runs.progress import Progress
from secateur.training.job import Job
from secateur.training.log import Log, follower
from secateur.training.state import read_state, write_state
from secateur.training.trainer import Trainer

# Figures wait on the device for some steps, so that steps do not wait for figures.
_FETCH_STEPS = 10
_CURVE_POINTS = 100


def resume(job: Job, trainer: Trainer) -> int:
    """Go on from the state that an earlier session wrote; returns the steps it has done."""
    trainer.optimiser.steps = read_state(job.work, trainer.state(), job.ranks)
    return trainer.done


def do_steps(
    job: Job,
    trainer: Trainer,
    progress: Progress,
    validated: Callable[[float], None] = lambda loss: None,
) -> Log | None:
    """Do all steps that are left, validate, and write states.

    Args:
        job: the run.
        trainer: with the steps done so far.
        progress: told how many steps are done.
        validated: called with every held-out loss, before the next step.

    Returns:
        the log of the first process, which alone has one.
    """
    options, resumed = job.options, trainer.done
    with follower(options.log_to if job.ranks.first else None, job.work) as follow:
        log = Log(job.work / "log.jsonl", resumed, follow) if job.ranks.first else None

        def write(entry: dict[str, float | None]) -> None:
            if log is not None:
                log.add(entry)

        def validate() -> None:
            loss = trainer.validation_loss(job.text.held_out_WL)
            write({"step": trainer.done, "validation_loss": loss})
            validated(loss)

        if resumed == 0:
            validate()
        every = max(1, options.steps // options.validations)
        saved = began = time.monotonic()
        progress("Training", resumed, options.steps)
        while trainer.done < options.steps:
            trainer.step()
            is_validated = trainer.done % every == 0 or trainer.done == options.steps
            due = time.monotonic() - saved >= 60 * options.checkpoint_minutes
            # A state is written by all processes at the same step, whatever their clocks say.
            save_state = job.ranks.agree(due)
            if is_validated or save_state or trainer.done % _FETCH_STEPS == 0:
                tokens = (trainer.done - resumed) * options.step_tokens
                speed = round(tokens / (time.monotonic() - began), 1)
                for figures in trainer.figures():
                    write({**asdict(figures), "tokens_per_second": speed})
            if is_validated:
                validate()
            if save_state:
                write_state(job.work, trainer.done, trainer.state(), job.ranks)
                saved = time.monotonic()
            progress("Training", trainer.done, options.steps)
    return log


def curve(log: Log) -> list[dict[str, float]]:
    """Up to a hundred steps of a log, the last one included."""
    steps = log.with_key("cross_entropy")
    stride = max(1, -(-len(steps) // _CURVE_POINTS))
    return [dict(entry) for entry in steps[::-1][::stride][::-1]]
