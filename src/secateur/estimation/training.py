"""Memory of ``train`` and ``recover``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from secateur.estimation.estimate import pruning_peak
from secateur.estimation.trial import Trial, peak_of
from secateur.models.checkpoint import Checkpoint
from secateur.models.headers import headers_of
from secateur.models.miniature import write_miniature
from secateur.report.documents.prune import Needs
from secateur.training.options import RunOptions, Training
from secateur.training.recover import recover
from secateur.training.recovery_options import Recovery
from secateur.training.train import first_recipe, train

# Steps and windows that show all that more of them need.
_STEPS = 2
_VALIDATION_WINDOWS = 4


def estimate_training(
    model: str | Path,
    options: Training,
    *,
    teacher: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Needs:
    """Estimate the peak memory of ``train``; arguments are its own.

    Raises:
        SecateurError: model or options are refused.
    """
    with ExitStack() as stack:
        source = _opened(stack, model, trust_remote_code)
        other = None
        if teacher is not None and teacher != model:
            other = _opened(stack, teacher, trust_remote_code)
        return Needs(model=str(model), peak_memory_bytes=_training_peak(source, other, options))


def _training_peak(source: Checkpoint, other: Checkpoint | None, options: Training) -> int:
    def run(trial: Trial) -> None:
        values = _scaled(options, trial)
        step = trial.length(options.length) * options.step_windows
        values |= {
            "tokens": _STEPS * step,
            "batch_tokens": step,
            "micro_batch_tokens": trial.length(options.length) * options.micro_batch_windows,
            "start": "magnitude",
            "lora_rank": -(-options.lora_rank // trial.divisor),
            "only": (),
            "skip": (),
        }
        # A pruned checkpoint learns from a dense one.
        dense = trial.text.parent / "teacher"
        if other is not None or options.keeps_mask:
            write_miniature(other or source, dense, trial.divisor, len(source.blocks))
        train(
            trial.model,
            Training.from_mapping(values, "ast"),
            trial.output,
            data=[str(trial.text)],
            teacher=dense if dense.exists() else None,
        )

    peak = peak_of(
        source,
        run,
        tokens=(_STEPS * options.step_windows + 4 * _VALIDATION_WINDOWS) * options.length,
        depth=len(source.blocks),
        pruned=options.keeps_mask,
    )
    if options.start == "auto" and not options.keeps_mask:
        # It prunes first, in the same process.
        peak = max(peak, pruning_peak(source, first_recipe(options, Path("text.jsonl"))))
    return peak


def estimate_recovery(
    model: str | Path,
    options: Recovery | None = None,
    *,
    teacher: str | Path,
    trust_remote_code: bool = False,
) -> Needs:
    """Estimate the peak memory of ``recover``; arguments are its own.

    Raises:
        SecateurError: a model or the options are refused.
    """
    options = options or Recovery()
    with ExitStack() as stack:
        source = _opened(stack, model, trust_remote_code)
        other = _opened(stack, teacher, trust_remote_code)
        return Needs(model=str(model), peak_memory_bytes=_recovery_peak(source, other, options))


def _recovery_peak(source: Checkpoint, other: Checkpoint, options: Recovery) -> int:
    def run(trial: Trial) -> None:
        values = _scaled(options, trial)
        step = trial.length(options.batch_tokens)
        values |= {
            "tokens": _STEPS * step,
            "batch_tokens": step,
            "rank": -(-options.rank // trial.divisor),
        }
        if options.blocks is not None:
            values["blocks"] = options.blocks.scaled(trial.divisor).model_dump(mode="json")
        dense = trial.text.parent / "teacher"
        write_miniature(other, dense, trial.divisor, len(other.blocks))
        recover(
            trial.model,
            trial.output,
            Recovery.from_mapping(values),
            teacher=dense,
            data=[str(trial.text)],
        )

    windows = options.block_windows + _VALIDATION_WINDOWS
    tokens = windows * options.length + _STEPS * options.batch_tokens
    return peak_of(source, run, tokens=tokens, depth=len(source.blocks))


def _opened(stack: ExitStack, model: str | Path, trust_remote_code: bool) -> Checkpoint:
    folder = stack.enter_context(headers_of(model))
    return Checkpoint.open(folder, trust_remote_code=trust_remote_code)


def _scaled(options: RunOptions, trial: Trial) -> dict[str, Any]:
    """What both have in common, for a miniature."""
    values = options.model_dump(mode="json")
    top_k = values["distillation"]["top_k"]
    if top_k is not None:
        values["distillation"]["top_k"] = -(-top_k // trial.divisor)
    return values | {
        "length": trial.length(values["length"]),
        "validations": 1,
        "validation_windows": min(values["validation_windows"], _VALIDATION_WINDOWS),
        "log_to": None,
    }
