"""BESA: learn how a block's zeros are spread over its rows or linears."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from typing import ClassVar, Literal, Self

import torch
from pydantic import AliasChoices, Field, model_validator
from torch import Tensor

from secateur.blocks.tasks import BlockTask
from secateur.methods.descent import descend
from secateur.methods.rows import block_scores, take_best, uniform_masks, write_masks
from secateur.methods.stage import BlockStage
from secateur.models.forwards import replaced_forwards
from secateur.models.structure import Linear
from secateur.patterns.pattern import Pattern
from secateur.solvers.besa import ascending_ranks, mask_of_counts, masked_linear
from secateur.solvers.block_loss import relative_loss
from secateur.solvers.grids import Clipping, GridOptions, make_grid
from secateur.solvers.rates import (
    candidate_counts,
    candidate_rates,
    exact_counts,
    expected_rate,
    mean_rate,
    rate_distribution,
    reachable_rates,
    sparsity_penalty,
    truncated_counts,
)

# A learning rate of clipping strengths under which their sigmoids move within one pass.
_CLIP_RATE = 0.05
# OmniQuant's first logit of a strength, which is 0.982.
_FIRST_LOGIT = 4.0


class BESA(BlockStage):
    """Learn a distribution over pruning rates for each row, against the output of the block."""

    needs_norms: ClassVar[bool] = True
    unstructured_only: ClassVar[bool] = True
    repeats: ClassVar[tuple[str, ...]] = ("epochs",)

    method: Literal["besa"] = "besa"
    batch_sequences: int = Field(1, ge=1, le=2**20, description="calibration windows in one step")
    scope: Literal["row", "linear"] = Field(
        "row",
        validation_alias=AliasChoices("scope", "granularity"),
        description="what shares a rate: a row or a whole linear",
    )
    parameterisation: Literal["softmax", "paper"] = Field(
        "softmax",
        description="softmax reaches every rate; paper is that of the released code, a softmax of "
        "sigmoids, which reaches from 37.6 to 62.4 percent",
    )
    sparsity_step: float = Field(0.01, ge=1e-4, le=1, description="between candidate rates")
    penalty: float = Field(
        5.0, ge=0, le=1e6, description="weight of the sparsity term, the paper's lambda"
    )
    optimiser: Literal["adam", "prodigy"] = Field(
        "adam",
        description="of the logits; adam ends in ever smaller steps, prodigy, the released code's, "
        "finds their size itself",
    )
    learning_rate: float = Field(0.1, gt=0, le=1e3, description="of Adam, at its highest")
    d_coef: float = Field(5.0, gt=0, le=1e6, description="scale of the step that Prodigy estimates")
    loss: Literal["token", "feature"] = Field(
        "token",
        description="error of each token's hidden state; or of each feature, over tokens, which is "
        "the released code's",
    )
    epochs: int = Field(
        1, ge=1, le=10_000, description="passes over the fitted calibration windows"
    )
    clip_rate: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="learning rate of clipping strengths, which are learned along with the rates; "
        "by default 0.05 if the recipe rounds weights to a grid, and 0, pruning as if it did not "
        "quantise, if it does so with error feedback",
    )

    @model_validator(mode="after")
    def _optimiser_is_installed(self) -> BESA:
        if self.optimiser == "prodigy" and find_spec("prodigyopt") is None:
            raise ValueError(
                "the optimiser prodigy needs prodigyopt; install it with: pip install "
                "'secateur[paper]', or use optimiser: adam"
            )
        return self

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError for n:m, or a sparsity that the parameterisation cannot reach."""
        super().check_pattern(pattern)
        low, high = reachable_rates(
            candidate_rates(self.sparsity_step), smooth=self.parameterisation == "paper"
        )
        if not low <= pattern.sparsity <= high:
            raise ValueError(
                f"the paper's parameterisation of besa reaches sparsities from {low:.3f} to "
                f"{high:.3f}, not {pattern.sparsity:g}; use parameterisation: softmax"
            )

    def scaled(self, divisor: int) -> Self:
        stage = super().scaled(divisor)
        # Candidates are a size as well: each row has a number for each of them.
        return stage.model_copy(update={"sparsity_step": min(0.5, self.sparsity_step * divisor)})

    def passes(self, sequences: int) -> float:
        return 3.0 * self.epochs

    def apply(self, task: BlockTask) -> None:
        learned, clippings = self._learn(task)
        candidates = {"uniform rates": uniform_masks(task), "learned rates": learned}
        if not clippings:
            take_best(task, self.method, candidates)
            return
        clipped = {f"{name} and clipping": masks for name, masks in candidates.items()}
        candidates = {"uniform rates": candidates["uniform rates"], **clipped}
        take_best(task, self.method, candidates, dict.fromkeys(clipped, clippings))

    def _learn(self, task: BlockTask) -> tuple[dict[str, Tensor], dict[str, Clipping]]:
        """Masks, and how the grid of the recipe is best clipped, if it has one."""
        rates = candidate_rates(self.sparsity_step)
        weights = sum(dense_OI.numel() for dense_OI in task.dense.values())
        zeros = sum(task.zeros.values())
        rows = self._rows(task, rates, zeros / weights)
        batches = task.training_batches(self.batch_sequences, self.epochs)

        def error(batch: Tensor) -> Tensor:
            betas, alphas = self._distributions(rows, rates)
            with _masked(rows, betas, alphas):
                loss = self._error(task, batch)
            if zeros == 0:
                return loss
            rate = mean_rate(alphas, [each.dense_OI.numel() for each in rows])
            return loss + sparsity_penalty(rate, zeros / weights, self.penalty)

        write_masks(task, {})
        self._descend(rows, batches, error, self._clip_rate(task))
        _, alphas = self._distributions(rows, rates)
        clippings = {each.linear.name: each.clipping.strengths for each in rows if each.clipping}
        return _exact_masks(rows, alphas, zeros), clippings

    def _rows(self, task: BlockTask, rates: tuple[Fraction, ...], sparsity: float) -> list[_Rows]:
        """The linears, with logits to begin with: of the target, or all alike as released."""
        start_D = torch.zeros(len(rates), device=task.device)
        if self.parameterisation == "softmax":
            start_D = _tilted(rates, sparsity).to(task.device)
        grid = task.quantization.grid if task.quantization and self._clip_rate(task) else None
        made = []
        for linear in task.linears:
            dense_OI = task.dense[linear.name]
            counts = candidate_counts(rates, dense_OI.shape[1])
            made.append(
                _Rows(
                    linear=linear,
                    dense_OI=dense_OI,
                    rank_OI=ascending_ranks(block_scores(task, linear.name)),
                    counts_D=torch.tensor(counts, device=task.device),
                    theta_GD=start_D.repeat(len(dense_OI) if self.scope == "row" else 1, 1),
                    clipping=LearnedClipping(dense_OI, grid, task.stored) if grid else None,
                )
            )
        return made

    def _clip_rate(self, task: BlockTask) -> float:
        """The one asked for; by default none before error feedback, which needs no clipping."""
        if self.clip_rate is not None:
            return self.clip_rate
        return _CLIP_RATE if task.quantization and task.quantization.rounds_to_nearest else 0.0

    def _descend(
        self,
        rows: list[_Rows],
        batches: list[Tensor],
        error: Callable[[Tensor], Tensor],
        clip_rate: float,
    ) -> None:
        """Train clipping strengths by Adam, and rates too unless Prodigy is asked for."""
        thetas = [each.theta_GD for each in rows]
        clippings = [each.clipping for each in rows if each.clipping]
        rates = {logit: clip_rate for each in clippings for logit in each.logits}
        if self.optimiser == "adam":
            descend(rates | dict.fromkeys(thetas, self.learning_rate), batches, error)
            return
        from prodigyopt import Prodigy

        prodigy = Prodigy(thetas, lr=1.0, betas=(0.9, 0.999), d_coef=self.d_coef)

        def step() -> None:
            prodigy.step()
            prodigy.zero_grad()

        for theta_GD in thetas:
            theta_GD.requires_grad_(True)
        descend(rates, batches, error, finish=step)
        for theta_GD in thetas:
            theta_GD.requires_grad_(False)

    def _error(self, task: BlockTask, batch: Tensor) -> Tensor:
        if self.loss == "feature":
            return relative_loss(task.output(batch), task.target(batch))
        return task.loss(batch)

    def _distributions(
        self, rows: list[_Rows], rates: tuple[Fraction, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        smooth = self.parameterisation == "paper"
        betas = [rate_distribution(each.theta_GD, smooth=smooth) for each in rows]
        return betas, [expected_rate(beta_GD, rates) for beta_GD in betas]


class LearnedClipping:
    """Two strengths for each group of a linear, the sigmoids of two logits.

    Attributes:
        logits: those of the lower and of the upper ends, (out, groups) each; they want gradients.
    """

    def __init__(self, w_OI: Tensor, options: GridOptions, stored: torch.dtype) -> None:
        self._options = options
        self._stored = stored
        shape = Clipping.none(w_OI, options).lower_OG
        self.logits = [torch.full_like(shape, _FIRST_LOGIT).requires_grad_() for _ in range(2)]

    @property
    def strengths(self) -> Clipping:
        """The strengths, with their graph where gradients are recorded."""
        lower, upper = self.logits
        return Clipping(lower.sigmoid(), upper.sigmoid())

    def on_grid(self, w_OI: Tensor, mask_OI: Tensor) -> Tensor:
        """All weights, removed ones too, as values of the grid that the kept ones span."""
        grid = make_grid(w_OI, mask_OI, self._options, self.strengths, self._stored)
        return grid.nearest(w_OI)


@dataclass
class _Rows:
    """A linear whose rows lose their lowest ranks, and the logits that say how many."""

    linear: Linear
    dense_OI: Tensor
    rank_OI: Tensor
    counts_D: Tensor
    theta_GD: Tensor
    clipping: LearnedClipping | None

    def masked(self, beta_GD: Tensor, alpha_G: Tensor) -> Callable[[Tensor], Tensor]:
        """The linear at these expected rates, with gradients for their distribution."""
        count_O = truncated_counts(alpha_G, *self.dense_OI.shape)
        return partial(
            masked_linear,
            w_OI=self._weights(count_O),
            rank_OI=self.rank_OI,
            count_O=count_O,
            beta_GD=beta_GD,
            counts_D=self.counts_D,
            bias_O=self.linear.bias_O,
        )

    def _weights(self, count_O: Tensor) -> Tensor:
        """Dense weights; or their values on the grid, if there is one, for these counts."""
        if self.clipping is None:
            return self.dense_OI
        return self.clipping.on_grid(self.dense_OI, mask_of_counts(self.rank_OI, count_O))


def _masked(
    rows: list[_Rows], betas: list[Tensor], alphas: list[Tensor]
) -> AbstractContextManager[None]:
    """Within the context the linears run with their masks, and gradients reach the betas."""
    return replaced_forwards(
        (each.linear.module, each.masked(beta_GD, alpha_G))
        for each, beta_GD, alpha_G in zip(rows, betas, alphas, strict=True)
    )


def _exact_masks(rows: list[_Rows], alphas: list[Tensor], zeros: int) -> dict[str, Tensor]:
    """Shift all rates alike until the zeros are as many as the plan says."""
    sizes = [each.dense_OI.shape for each in rows]
    rate_R = torch.cat(
        [
            alpha_G.repeat_interleave(size[0] // len(alpha_G))
            for alpha_G, size in zip(alphas, sizes, strict=True)
        ]
    )
    columns_R = torch.cat([torch.full((size[0],), size[1], device=rate_R.device) for size in sizes])
    counts = exact_counts(rate_R, columns_R, zeros).split([size[0] for size in sizes])
    return {
        each.linear.name: mask_of_counts(each.rank_OI, count_O)
        for each, count_O in zip(rows, counts, strict=True)
    }


def _tilted(rates: tuple[Fraction, ...], mean: float) -> Tensor:
    """Logits, linear in the rate, whose expected rate is ``mean``; zeros for one half."""
    rate_D = torch.tensor([float(rate) for rate in rates], dtype=torch.float64)
    low, high = -1000.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((rate_D * middle).softmax(0) @ rate_D) < mean:
            low = middle
        else:
            high = middle
    return (rate_D * ((low + high) / 2)).float()
