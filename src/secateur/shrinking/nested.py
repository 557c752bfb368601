"""The default preset: nested orders of units, widths by a knapsack, output matrices refitted.

Which units of a sub-block go is solved in closed form. How many go only the whole model can tell;
it is learned from few sub-models. Two passes over the blocks, one block in memory at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from secateur.blocks.streams import Batches, Stream, memory_budget
from secateur.report.documents.shrink import LatencyReport, SurveyReport
from secateur.runs.errors import SecateurError
from secateur.runs.meter import Stopwatch
from secateur.runs.progress import Progress
from secateur.shrinking.job import Chosen, Job, describe_sub_block
from secateur.shrinking.latency import time_widths
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.refit import CutSubBlock, cut_blocks, pass_cut_blocks, refitted_file
from secateur.shrinking.stock import percent_below
from secateur.shrinking.sub_models import draw_widths
from secateur.shrinking.survey import Survey, survey
from secateur.shrinking.units import (
    Width,
    all_units,
    block_parameters,
    kept_parameters,
    with_whole,
)
from secateur.shrinking.widths import (
    choose_widths,
    least_cost,
    parameter_costs,
)


def choose_nested(job: Job, watch: Stopwatch, progress: Progress) -> Chosen:
    """Choose widths and units, and fit what is left to them: the preset ``default``.

    Attention and feed-forward of every block get widths within the target, unless it has them
    already; then the blocks are cut one after the other.
    """
    calibration = job.calibrate(job.load, progress)
    watch.lap("calibration text")
    resumed = max(0, len(job.run.finished) - 1)
    if not job.run.finished:
        job.run.record(_plan(job, calibration.tokens, progress))
    watch.lap("widths")
    plan = job.run.finished[0]
    widths = [Width(*each) for each in plan["widths"]]
    _cut(job, widths, calibration.tokens, progress)
    watch.lap("cutting and refit")
    done = [each for block in job.run.finished[1:] for each in block["sub_blocks"]]
    return Chosen(
        kept=[_units(each) for each in done],
        sub_blocks=[
            describe_sub_block(sub_block, width, **why, **each["errors"])
            for sub_block, width, why, each in zip(
                job.sub_blocks, widths, plan["why"], done, strict=True
            )
        ],
        # The refit runs most of each block once more for either of its sub-blocks.
        tokens=plan["tokens"] + 3 * calibration.tokens.numel(),
        calibration=calibration.description,
        resumed=resumed,
        refitted=job.run.folder / "refitted",
        survey=None if plan["survey"] is None else SurveyReport.model_validate(plan["survey"]),
        latency=None if plan["latency"] is None else LatencyReport.model_validate(plan["latency"]),
        notes=[*plan["notes"], *(note for each in done for note in each["notes"])],
    )


def _plan(job: Job, tokens_SL: Tensor, progress: Progress) -> dict[str, Any]:
    """What the manifest keeps of the widths: enough to go on behind them, and for the report."""
    if job.target.widths is not None:
        why: list[dict[str, Any]] = [{} for _ in job.sub_blocks]
        nothing: dict[str, Any] = {"survey": None, "latency": None, "tokens": 0, "notes": []}
        return {"widths": job.target.widths, "why": why, **nothing}
    free = job.free
    removable = kept_parameters(free, all_units(free))
    grids = job.grids()
    costs = parameter_costs(free, grids)
    budget, total, timing = removable - job.target.budget, block_parameters(job.source.blocks), None
    if job.options.budget == "latency":
        store = job.source.store(job.device)
        timing = time_widths(store, free, grids, tokens_SL[0], job.device, job.dtype)
        costs, budget, total = timing.costs, timing.budget(job.options.sparsity), timing.total
    sparsities = [job.target.budget / removable] * job.options.sub_models
    seen = survey_model(job, tokens_SL, sparsities, progress)
    penalties = seen.penalties.nats
    _check_reachable(job.options, costs, penalties, budget, total)
    (chosen,) = choose_widths(costs, penalties, [budget])
    latency = None
    if timing is not None:
        gone = sum(each[-1] for each in costs) - chosen.cost
        latency = LatencyReport(
            tokens=tokens_SL.shape[1],
            before=timing.total / 1e9,
            expected=(timing.total - gone) / 1e9,
        ).model_dump(mode="json")
    widths = [grid[choice] for grid, choice in zip(seen.grids, chosen.choices, strict=True)]
    why_of = {
        each.label: {
            "local_loss": losses[choice],
            "penalty": nats[choice],
            "next_penalty": next(filter(isfinite, reversed(nats[:choice])), None),
        }
        for each, losses, nats, choice in zip(
            free, seen.losses, penalties, chosen.choices, strict=True
        )
    }
    return {
        "widths": with_whole(job.sub_blocks, widths),
        "why": [why_of.get(each.label, {}) for each in job.sub_blocks],
        "survey": seen.report(chosen.loss).model_dump(mode="json"),
        "latency": latency,
        "tokens": seen.tokens,
        "notes": seen.notes,
    }


def _check_reachable(
    options: ShrinkOptions,
    costs: Sequence[Sequence[int]],
    penalties: Sequence[Sequence[float]],
    budget: int,
    total: int,
) -> None:
    """Hold a budget against the least that widths of known penalty cost."""
    least = least_cost(costs, penalties)
    if budget < least:
        most = (sum(cost[-1] for cost in costs) - least) / total
        raise SecateurError(
            f"The sub-models tell of no widths that remove {options.sparsity:.1%} of the blocks' "
            f"{'time' if options.budget == 'latency' else 'parameters'}; remove "
            f"{percent_below(most)} or less, or give more --sub-models."
        )


def survey_model(
    job: Job, tokens_SL: Tensor, sparsities: Sequence[float], progress: Progress
) -> Survey:
    """Find out what widths cost, with a sub-model around each of the sparsities."""
    grids = job.grids()
    generator = torch.Generator().manual_seed(job.options.calibration.seed)
    places = draw_widths(parameter_costs(job.free, grids), sparsities, generator)
    count, length = tokens_SL.shape
    options = job.options
    start = Batches.of(count, length, options.batch_tokens).boundary
    windows = slice(start, min(start + max(1, options.trial_tokens // length), count))
    memory = memory_budget(None) // 2
    stream = _stream(job, tokens_SL, memory, {windows.stop - start})
    store = job.source.store(job.device)
    return survey(store, job.free, grids, places, tokens_SL, windows, stream, memory, progress)


def _cut(job: Job, widths: Sequence[Width], tokens_SL: Tensor, progress: Progress) -> None:
    """Cut and refit the blocks that no earlier session has finished."""
    store = job.source.store(job.device)
    folder = job.run.folder / "refitted"
    stream = _stream(job, tokens_SL, memory_budget(None))
    finished = [each for block in job.run.finished[1:] for each in block["sub_blocks"]]
    if finished:
        earlier = job.sub_blocks[: len(finished)]
        pass_cut_blocks(store, earlier, [_units(each) for each in finished], stream, folder)
    for cut in cut_blocks(store, job.sub_blocks, widths, stream, folder):
        written = [refitted_file(folder, stream.position - 1)]
        job.run.record({"sub_blocks": [_describe(each) for each in cut]}, written)
        progress("Cutting blocks", stream.position, len(store.blocks))


def _describe(cut: CutSubBlock) -> dict[str, Any]:
    errors = {"held_out_error": cut.error, "error_without_refit": cut.plain_error}
    return {"kept": cut.kept.tolist(), "errors": errors, "notes": list(cut.notes)}


def _units(described: dict[str, Any]) -> Tensor:
    return torch.tensor(described["kept"], dtype=torch.int64)


def _stream(job: Job, tokens_SL: Tensor, memory: int, sizes: Collection[int] = ()) -> Stream:
    return Stream(
        job.source.store(job.device),
        tokens_SL,
        Batches.of(len(tokens_SL), tokens_SL.shape[1], job.options.batch_tokens),
        job.device,
        job.dtype,
        job.run.folder,
        memory,
        sizes,
    )
