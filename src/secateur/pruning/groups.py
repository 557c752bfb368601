"""Prune the linears of a block group by group, each on what the ones before leave it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from secateur.blocks.inputs import (
    InputAccumulator,
    LinearGroup,
    judged_tokens,
    steps,
    visit_inputs,
)
from secateur.blocks.tasks import GroupTask, InputStatistics, Needs
from secateur.methods.magnitude import Magnitude
from secateur.methods.stage import GroupStage
from secateur.models.structure import Linear
from secateur.patterns.pattern import Budget, Pattern
from secateur.pruning.pruned import OpenBlock, PrunedBlock
from secateur.runs.errors import SecateurError
from secateur.runs.meter import Stopwatch
from secateur.solvers.grids import Clipping


class GroupPruner:
    """Applies stages that work on one group of linears after the other.

    Args:
        stages: in order.
        pattern: what masks must look like.
        device: where blocks are worked on.
        dtype: of forward passes.
        dense_inputs: take all statistics while the block is dense, and not each group's behind
            the pruned groups before it.
    """

    def __init__(
        self,
        stages: Sequence[GroupStage],
        pattern: Pattern,
        device: torch.device,
        dtype: torch.dtype,
        *,
        dense_inputs: bool = False,
    ) -> None:
        self._dense_inputs = dense_inputs
        self._stages = stages
        self._pattern = pattern
        self._device = device
        self._dtype = dtype
        order: list[Needs] = ["nothing", "norms", "gram"]
        self._needs = max((stage.needs for stage in stages), key=order.index)

    def prune(self, work: OpenBlock, groups: Sequence[LinearGroup], watch: Stopwatch) -> None:
        """Apply the stages to the block's linears in the order they run.

        Args:
            work: the block; its weights are replaced.
            groups: linears by shared input, in the order of execution.
            watch: times the phases.
        """
        done: set[str] = set()
        for step in [groups] if self._dense_inputs else steps(groups):
            statistics, held_out = self._inputs(work, step)
            _require_finite(work.name, step, statistics)
            watch.lap("statistics")
            for group, seen, x_NI in zip(step, statistics, held_out, strict=True):
                self._solve(work, group, seen, x_NI)
                done |= {linear.name for linear in group.linears}
            work.replay.finish(done)
            watch.lap("solve")

    def _inputs(
        self, work: OpenBlock, step: Sequence[LinearGroup]
    ) -> tuple[list[InputStatistics], list[Tensor]]:
        stream = work.stream
        run = partial(stream.forward, work.block, replay=work.replay)
        widths = [group.linears[0].weight_OI.shape[1] for group in step]
        sums = [InputAccumulator(w, self._needs, self._device, self._dtype) for w in widths]
        held_out = [torch.empty(0, w, device=self._device, dtype=self._dtype) for w in widths]

        def add(group: int, x_NI: Tensor) -> None:
            sums[group].add(x_NI)

        def keep(group: int, x_NI: Tensor) -> None:
            held_out[group] = judged_tokens(x_NI).to(self._dtype)

        if self._needs != "nothing":
            for batch in stream.batches.fitted:
                visit_inputs(step, partial(run, batch), add)
        first = stream.batches.held_out[0]
        visit_inputs(step, partial(run, first), keep)
        return [each.result() for each in sums], held_out

    def _solve(
        self,
        work: OpenBlock,
        group: LinearGroup,
        statistics: InputStatistics,
        held_out_NI: Tensor,
    ) -> None:
        dense, pruned = work.dense, work.pruned
        linears = group.linears
        names = tuple(linear.name for linear in linears)
        w_OI = torch.cat([linear.weight_OI for linear in linears])
        # With one weight `cat` copies as well, so the task's weights are never the module's.
        task = GroupTask(
            names=names,
            dense_OI=w_OI.clone() if dense is None else torch.cat([dense[name] for name in names]),
            w_OI=w_OI,
            budget=Budget(
                self._pattern,
                rows=tuple(len(linear.weight_OI) for linear in linears),
                zeros=tuple(work.zeros[linear.name] for linear in linears),
            ),
            statistics=statistics,
            held_out_NI=held_out_NI,
            stored=work.stored,
        )
        if names[0] in pruned.masks:
            task.mask_OI = torch.cat([pruned.masks[name] for name in names]).to(w_OI.device)
        if names[0] in pruned.clippings:
            task.clipping = Clipping.joined([pruned.clippings[name] for name in names])
        if self._needs != "nothing" and statistics.tokens == 0:
            if task.mask_OI is None and not self._stages[0].works_blind:
                Magnitude(scope="row").apply(task)
                done = "pruned by magnitude"
            else:
                done = "mask and weights left as they were"
            task.notes.append(f"{', '.join(names)}: no token arrived, {done}")
            for stage in self._stages:
                if stage.works_blind:
                    stage.apply(task)
        else:
            for stage in self._stages:
                stage.apply(task)
        task.w_OI.copy_(task.w_OI.to(work.stored))
        self._write_back(linears, task, pruned)

    def _write_back(self, linears: Sequence[Linear], task: GroupTask, pruned: PrunedBlock) -> None:
        assert task.mask_OI is not None
        if not bool(torch.isfinite(task.w_OI).all()):
            raise SecateurError(
                f"The new weights of {', '.join(task.names)} are not finite; please report the "
                "model and the recipe, and use another method meanwhile."
            )
        errors = task.held_out_errors(task.w_OI)
        for linear, rows, error in zip(linears, task.row_slices(), errors, strict=True):
            linear.weight_OI.copy_(task.w_OI[rows])
            pruned.masks[linear.name] = task.mask_OI[rows].cpu()
            pruned.errors[linear.name] = error
            if task.quantized is not None:
                pruned.quantised[linear.name] = task.quantized.rows(rows)
                zero_OI = (linear.weight_OI == 0) & task.mask_OI[rows]
                pruned.rounded_to_zero[linear.name] = int(zero_OI.sum())
        pruned.notes += task.notes
        pruned.rejected += task.rejected


def _require_finite(
    name: str, step: Sequence[LinearGroup], statistics: Sequence[InputStatistics]
) -> None:
    for group, seen in zip(step, statistics, strict=True):
        if not bool(torch.isfinite(seen.mean_square_I).all()):
            raise SecateurError(
                f"The inputs of {name}.{group.linears[0].name} contain NaN or infinite values; try "
                "--dtype float32, and check that the model itself runs on this text."
            )
