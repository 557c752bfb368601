"""Size against expected loss: all sizes of a model from one pass over it."""

from __future__ import annotations

import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from secateur.report.documents.shrink import CurvePoint, SizeCurve, TriedSubModel
from secateur.report.page import write_report
from secateur.report.svg import Series, draw, fit_axis
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_text
from secateur.runs.machine import describe_machine, peak_memory
from secateur.runs.progress import Progress, silent
from secateur.shrinking.job import Job, taken
from secateur.shrinking.nested import survey_model
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.survey import Survey
from secateur.shrinking.units import all_units, block_parameters, kept_parameters, with_whole
from secateur.shrinking.widths import choose_widths, least_cost, parameter_costs

# Shares that points of the curve remove, in twentieths, and shares that sub-models lack.
_TWENTIETHS = range(1, 17)
_TRIED = (0.05, 0.7)
SIZE_LABEL = "parameters removed from the blocks"
LOSS_LABEL = "KL from the dense model, nats per token"


def size_curve(
    model: str | Path,
    output: str | Path,
    options: ShrinkOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> SizeCurve:
    """Find out what every size of a model is expected to cost, and write it as JSON and SVG.

    Nothing is cut. Sub-models lack from 5 to 70 percent, so that one fit serves all sizes; widths
    for one size alone are chosen better by ``shrink``, whose sub-models are all of that size.

    Args:
        model: a checkpoint folder, hub id or GGUF file.
        output: a new or empty folder for ``curve.json`` and ``curve.svg``.
        options: of the default preset; sparsity and form are of no concern.
        tokenizer: for calibration text; the checkpoint's own if None.
        restart: start over in the folder of an earlier run.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: anything the user can mend, before work starts where that is possible.
    """
    options = options or ShrinkOptions()
    if options.preset != "default" or options.form != "uneven":
        raise SecateurError(
            "A curve is of the default preset and of widths that differ; leave out --preset, "
            "--uniform and --padded."
        )
    if options.budget != "parameters":
        raise SecateurError("A curve is of parameters; leave out --budget.")
    target = Path(output).expanduser()
    with taken(
        model, target, options, tokenizer, restart, trust_remote_code, progress, curve=True
    ) as job:

        def work() -> SizeCurve:
            curve = _measure(job, progress)
            write_text(target / "curve.svg", _plot(curve))
            return curve

        return job.run.live(SizeCurve, work, page=write_report, report="curve.json")


def _measure(job: Job, progress: Progress) -> SizeCurve:
    started = time.perf_counter()
    options = job.options
    calibration = job.calibrate(job.load, progress)
    low, high = _TRIED
    count = options.sub_models
    sparsities = [low + (high - low) * (number + 0.5) / count for number in range(count)]
    seen = survey_model(job, calibration.tokens, sparsities, progress)
    points = _points(job, seen)
    return SizeCurve(
        model=job.name,
        options=options.model_dump(mode="json"),
        calibration=calibration.description,
        forward_dtype=str(job.dtype).removeprefix("torch."),
        blocks_before=block_parameters(job.source.blocks),
        points=points,
        sub_models=_tried(job, seen),
        survey=seen.report(points[-1].divergence),
        forward_tokens=seen.tokens,
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_memory(),
        machine=describe_machine(job.device),
        notes=seen.notes,
    )


def _points(job: Job, seen: Survey) -> list[CurvePoint]:
    total = block_parameters(job.source.blocks)
    free = job.free
    removable = kept_parameters(free, all_units(free))
    costs = parameter_costs(free, seen.grids)
    most = (removable - least_cost(costs, seen.penalties.nats)) / total
    targets = [share / 20 for share in _TWENTIETHS if share / 20 <= most]
    budgets = [removable - round(target * total) for target in targets]
    chosen = choose_widths(costs, seen.penalties.nats, budgets)
    points = []
    for target, selection in zip(targets, chosen, strict=True):
        picked = (grid[at] for grid, at in zip(seen.grids, selection.choices, strict=True))
        found = zip(job.sub_blocks, with_whole(job.sub_blocks, picked), strict=True)
        widths = {each.label: width for each, width in found}
        gone = removable - selection.cost
        points.append(
            CurvePoint(
                target=target,
                removed=gone / total,
                blocks_after=total - gone,
                divergence=selection.loss,
                widths={label: width.units for label, width in widths.items()},
                queries={
                    each.label: widths[each.label].queries
                    for each in job.sub_blocks
                    if widths[each.label].queries < each.heads_per_unit
                },
            )
        )
    return points


def _tried(job: Job, seen: Survey) -> list[TriedSubModel]:
    total = block_parameters(job.source.blocks)
    tried = []
    costs = parameter_costs(job.free, seen.grids)
    for places, value in zip(seen.places, seen.divergences, strict=True):
        gone = sum(cost[-1] - cost[place] for cost, place in zip(costs, places, strict=True))
        finite = value if value < float("inf") else None
        tried.append(TriedSubModel(removed=gone / total, divergence=finite))
    return tried


def _plot(curve: SizeCurve) -> str:
    expected = [(0.0, 0.0), *((point.removed, point.divergence) for point in curve.points)]
    tried = [(each.removed, each.divergence) for each in curve.sub_models]
    return draw(
        f"{Path(curve.model).name}: size against expected loss",
        [Series("sub-model", tried, kind="loose"), Series("expected", expected)],
        fit_axis(SIZE_LABEL, [x for x, _ in expected], zero=True, percent=True),
        fit_axis(LOSS_LABEL, [y for _, y in expected], zero=True),
        alone=True,
    )
