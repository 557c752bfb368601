"""The default preset: nested orders of units, widths by a knapsack, output matrices refitted.

Which units of a sub-block go is solved in closed form; how many, which only the whole model can
tell, is learned from few sub-models. Two passes over the blocks, one block in memory at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from secateur.blocks.activations import memory_budget
from secateur.blocks.streams import Batches, Stream
from secateur.report.documents.shrink import LatencyReport, SurveyReport
from secateur.runs.meter import Stopwatch
from secateur.runs.progress import Progress
from secateur.shrinking.job import Chosen, Job
from secateur.shrinking.latency import Timing, time_widths
from secateur.shrinking.penalties import Penalties, fit_penalties
from secateur.shrinking.refitting import CutSubBlock, cut_blocks, pass_cut_blocks, refitted_file
from secateur.shrinking.report import describe_sub_block
from secateur.shrinking.sub_models import draw_widths
from secateur.shrinking.survey import Survey, Trials, survey
from secateur.shrinking.units import Width, all_units, kept_parameters
from secateur.shrinking.widths import choose_widths, parameter_costs

# Tokens that a sub-model is tried on, and tokens of other forward passes.
_TRIAL_TOKENS = 2048
_BATCH_TOKENS = 4096


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
        nothing: list[dict[str, Any]] = [{} for _ in job.sub_blocks]
        return {
            "widths": job.target.widths,
            "why": nothing,
            "survey": None,
            "latency": None,
            "tokens": 0,
            "notes": [],
        }
    removable = kept_parameters(job.sub_blocks, all_units(job.sub_blocks))
    grids = job.grids()
    costs = parameter_costs(job.sub_blocks, grids)
    budget, timing = removable - job.target.budget, None
    if job.options.budget == "latency":
        store = job.source.store(job.device)
        timing = time_widths(store, job.sub_blocks, grids, tokens_SL[0], job.device, job.dtype)
        costs, budget = timing.costs, timing.budget(job.options.sparsity)
    sparsities = [job.target.budget / removable] * job.options.sub_models
    seen = survey_model(job, tokens_SL, sparsities, progress)
    (chosen,) = choose_widths(costs, seen.penalties.nats, [budget])
    return {
        "widths": [grid[choice] for grid, choice in zip(seen.grids, chosen.choices, strict=True)],
        "why": [
            {
                "local_loss": losses[choice],
                "penalty": nats[choice],
                "next_penalty": _next(nats[:choice]),
            }
            for losses, nats, choice in zip(
                seen.survey.losses, seen.penalties.nats, chosen.choices, strict=True
            )
        ],
        "survey": describe_survey(seen, chosen.loss).model_dump(mode="json"),
        "latency": None
        if timing is None
        else _describe_timing(timing, chosen.cost, tokens_SL.shape[1]),
        "tokens": seen.survey.tokens,
        "notes": seen.survey.notes,
    }


def _describe_timing(timing: Timing, cost: int, tokens: int) -> dict[str, Any]:
    gone = sum(each[-1] for each in timing.costs) - cost
    return LatencyReport(
        tokens=tokens, before=timing.total / 1e9, expected=(timing.total - gone) / 1e9
    ).model_dump(mode="json")


def _next(narrower: Sequence[float]) -> float | None:
    """The last penalty that is finite, if there is one."""
    return next((nats for nats in reversed(narrower) if isfinite(nats)), None)


@dataclass(frozen=True)
class SurveyedModel:
    """What is known of every width of every sub-block.

    Attributes:
        grids: widths of each.
        places: for each sub-model the place of its width in each grid.
        survey: their local losses, and the divergences of sub-models.
        penalties: the divergence that each width is expected to cause.
        trial_tokens: that each sub-model was tried on.
    """

    grids: list[list[Width]]
    places: list[list[int]]
    survey: Survey
    penalties: Penalties
    trial_tokens: int


def survey_model(
    job: Job, tokens_SL: Tensor, sparsities: Sequence[float], progress: Progress
) -> SurveyedModel:
    """Find out what widths cost, with a sub-model around each of the sparsities."""
    grids = job.grids()
    generator = torch.Generator().manual_seed(job.options.calibration.seed)
    places = draw_widths(parameter_costs(job.sub_blocks, grids), sparsities, generator)
    length = tokens_SL.shape[1]
    held_out = slice(Batches.of(len(tokens_SL), length, _BATCH_TOKENS).boundary, len(tokens_SL))
    count = min(max(1, _TRIAL_TOKENS // length), held_out.stop - held_out.start)
    memory = memory_budget(None) // 2
    found = survey(
        job.source.store(job.device),
        job.sub_blocks,
        grids,
        tokens_SL,
        _stream(job, tokens_SL, memory, {count}),
        Trials(places, slice(held_out.start, held_out.start + count), memory),
        progress,
    )
    penalties = fit_penalties(grids, found.losses, places, found.divergences)
    return SurveyedModel(grids, places, found, penalties, count * length)


def describe_survey(seen: SurveyedModel, predicted: float) -> SurveyReport:
    """Say how the sub-models did."""
    finite = [value for value in seen.survey.divergences if isfinite(value)]
    return SurveyReport(
        sub_models=len(seen.survey.divergences),
        tokens=seen.trial_tokens,
        divergence_mean=statistics.fmean(finite),
        divergence_deviation=statistics.pstdev(finite),
        not_finite=len(seen.survey.divergences) - len(finite),
        explained=seen.penalties.explained,
        predicted_divergence=predicted,
    )


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
        Batches.of(len(tokens_SL), tokens_SL.shape[1], _BATCH_TOKENS),
        job.device,
        job.dtype,
        job.run.folder,
        memory,
        sizes,
    )
