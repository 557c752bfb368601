"""Round after round until the goal is reached, and on from where an interrupted run stopped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from secateur.models.text_path import find_blocks
from secateur.report.documents.shrink import RoundReport
from secateur.runs.meter import Stopwatch
from secateur.runs.progress import Progress
from secateur.runs.run import Run
from secateur.shrinking.bonsai import (
    Anywhere,
    Exactly,
    Goal,
    Parent,
    Round,
    RoundOptions,
    prune_round,
    remove,
)
from secateur.shrinking.job import Chosen, Job, describe_sub_block
from secateur.shrinking.options import round_shares
from secateur.shrinking.units import all_units, block_parameters, kept_parameters


def choose_in_rounds(job: Job, watch: Stopwatch, progress: Progress) -> Chosen:
    """Choose units as the paper does: the preset ``paper``."""
    options = job.options
    model = job.load()
    watch.lap("loading")
    shares = round_shares(options.sparsity, options.step)
    calibration = job.calibrate(lambda: model, progress)
    watch.lap("calibration text")
    resumed = len(job.run.finished)
    kept = run_rounds(
        job.run,
        Parent(find_blocks(model), job.free, job.dtype),
        _goal(job),
        shares,
        calibration.tokens,
        RoundOptions(options.prior, options.masks, options.calibration.seed),
        progress,
    )
    watch.lap("rounds")
    finished = job.run.finished
    kept_of = {each.label: units for each, units in zip(job.free, kept, strict=True)}
    rounds_of = {
        each.label: {
            "removed_by_round": [len(done["removed"][place]) for done in finished],
            "coefficients": [done["coefficients"][place] for done in finished],
        }
        for place, each in enumerate(job.free)
    }
    units = [kept_of.get(each.label, torch.arange(each.units)) for each in job.sub_blocks]
    return Chosen(
        kept=units,
        sub_blocks=[
            describe_sub_block(each, each.width_of(left), **rounds_of.get(each.label, {}))
            for each, left in zip(job.sub_blocks, units, strict=True)
        ],
        tokens=sum(each["tokens"] for each in finished),
        calibration=calibration.description,
        resumed=resumed,
        rounds=[RoundReport.model_validate(each["report"]) for each in finished],
    )


def _goal(job: Job) -> Goal:
    dense = [sub_block.units for sub_block in job.free]
    if job.target.widths is not None:
        widths = zip(job.sub_blocks, job.target.widths, strict=True)
        return Exactly([width.units for each, width in widths if not each.fixed], dense)
    costs = [sub_block.unit_parameters for sub_block in job.free]
    return Anywhere(job.target.budget, dense, costs)


def run_rounds(
    run: Run,
    parent: Parent,
    goal: Goal,
    shares: Sequence[float],
    tokens_SL: Tensor,
    options: RoundOptions,
    progress: Progress,
) -> list[Tensor]:
    """Return the units that are left of each sub-block after all rounds.

    Args:
        run: knows the rounds that earlier sessions finished, and is told of new ones.
        parent: the model.
        goal: how much goes.
        shares: of the goal that is reached after each round.
        tokens_SL: int64 (samples, length), the text of all rounds one behind the other.
        options: how a round looks for units.
        progress: called with (phase, done, total).
    """
    kept = all_units(parent.sub_blocks)
    dense = kept_parameters(parent.sub_blocks, kept)
    total = block_parameters(parent.blocks)
    number = 0
    for done in run.finished:
        kept = remove(kept, [torch.tensor(each, dtype=torch.int64) for each in done["removed"]])
        number = done["number"] + 1
    windows_RWL = tokens_SL.unflatten(0, (len(shares), -1))
    # The last share is reached in one round unless its candidates were too few to fill it.
    while number < len(shares) or not goal.reached(1.0, [len(units) for units in kept]):
        share = shares[min(number, len(shares) - 1)]
        if not goal.reached(share, [len(units) for units in kept]):
            started = time.perf_counter()
            windows_WL = windows_RWL[number % len(shares)]
            found = prune_round(parent, kept, goal, share, windows_WL, number, options, progress)
            kept = remove(kept, found.removed)
            gone = dense - kept_parameters(parent.sub_blocks, kept)
            took = time.perf_counter() - started
            run.record({"number": number, **_describe(found, gone / total, took)})
        number += 1
    return kept


def _describe(found: Round, share: float, seconds: float) -> dict[str, Any]:
    """What the manifest keeps of a round: enough to go on behind it, and for the report."""
    finite = [utility for utility in found.utilities if isfinite(utility)]
    report = RoundReport(
        share=share,
        loss=found.loss,
        utility_mean=statistics.fmean(finite),
        utility_deviation=statistics.pstdev(finite),
        not_finite=len(found.utilities) - len(finite),
        seconds=round(seconds, 3),
    )
    return {
        "removed": [units.tolist() for units in found.removed],
        "coefficients": found.coefficients,
        "tokens": found.tokens,
        "report": report.model_dump(mode="json"),
    }
