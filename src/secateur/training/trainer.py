"""The training loop: steps, masks, validation; no files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.blocks.precision import forward_precision
from secateur.evaluation.predictions import find_readout
from secateur.evaluation.scores import score_windows
from secateur.patterns.pattern import refuse_nan
from secateur.runs.errors import SecateurError
from secateur.solvers.pieces import smallest
from secateur.solvers.schedule import ramp, warm_up_cosine
from secateur.training.distillation import Loss, Teacher, backward_in_parts
from secateur.training.holding import Holding, recomputed
from secateur.training.masked_linear import MaskedLinear
from secateur.training.masks import favoured, flips, magnitude, renew_mask, sensitivity
from secateur.training.optimiser import MaskedAdamW
from secateur.training.options import Training
from secateur.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class StepFigures:
    """What one step did.

    Attributes:
        step: counted from 1.
        cross_entropy: of the text, nats per token.
        divergence: KL(teacher ‖ student) at the loss's temperature, nats per token.
        gradient_norm: before clipping.
        learning_rate: γ.
        decay: λ.
        flip_rate: share of all mask entries that changed after the step; None between choices.
    """

    step: int
    cross_entropy: float
    divergence: float
    gradient_norm: float
    learning_rate: float
    decay: float
    flip_rate: float | None = None


class Trainer:
    """Trains a model whose linears are masked, a step at a time.

    Attributes:
        holding: the model, and what this process has of it.
        parameters: what is trained, by name; fp32; this process's part.
        linears: those with a mask; this process's part.
        optimiser: with the steps done so far.
    """

    def __init__(
        self,
        holding: Holding,
        teacher: Teacher | None,
        windows_WL: Tensor,
        options: Training,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ) -> None:
        self.holding = holding
        self.model = holding.model
        self.linears = linears = holding.linears
        self.parameters = holding.train(options)
        self._teacher = teacher
        self._windows_WL = windows_WL
        self._options = options
        self._dtype = dtype
        self._ranks = ranks
        self._loss = Loss(
            options.distillation.weight if teacher else 0.0, options.distillation.temperature
        )
        self._weights = ranks.total(sum(each.mask.numel() for each in linears))
        # Step, learning rate, decay, and what is still on the device: sums and the norm.
        self._pending: list[tuple[int, float, float, Tensor]] = []
        self._figures: list[StepFigures] = []
        masked = {f"{each.name}.weight": each.mask for each in linears}
        self.optimiser = MaskedAdamW(
            self.parameters,
            {name: mask for name, mask in masked.items() if name in self.parameters},
            options.optimiser,
            options.decay,
            ranks,
        )
        with holding.masked():
            self._readout = holding.evaluate(lambda: find_readout(self.model, windows_WL[:1]))

    @property
    def done(self) -> int:
        """Steps done."""
        return self.optimiser.steps

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, as parts of whole tensors; views, not copies.

        The order of the text follows from its seed and the step, and no step draws random numbers,
        so there is no random state.
        """
        place = self.holding.global_tensor
        weights = {f"weight.{name}": place(name, p.data) for name, p in self.parameters.items()}
        moments = {
            name: place(name.partition(".")[2], tensor)
            for name, tensor in self.optimiser.state().items()
        }
        masks = {
            f"mask.{each.name}": place(f"{each.name}.weight", each.mask.view(torch.uint8))
            for each in self.linears
        }
        return weights | moments | masks

    def step(self) -> None:
        """Do the next step; its figures wait on the device until they are asked for."""
        options = self._options
        step = self.done
        frozen = step >= options.frozen_from
        if frozen:
            self._freeze()
        sums = self._accumulate(step * options.step_windows)
        norm = self._clip()
        steps, schedule = options.steps, options.optimiser
        rate = schedule.learning_rate * warm_up_cosine(
            step,
            steps,
            rise=round(schedule.warm_up * steps),
            fall=round((1 - schedule.tail) * steps),
            floor=schedule.floor,
        )
        risen = ramp(step, steps, options.decay.ramp_share)
        decay = 0.0 if frozen else options.decay.strength * risen
        self.optimiser.step(rate, decay)
        for parameter in self.parameters.values():
            parameter.grad = None
        self._pending.append((self.done, rate, decay, torch.cat([sums, norm[None]])))
        if self.done % options.masks.refresh_steps == 0 and self.done < options.frozen_from:
            # A loss that is not finite is told by its step before it spoils a score.
            self._fetch()
            self._figures[-1] = replace(self._figures[-1], flip_rate=self.refresh())

    @torch.no_grad()
    def refresh(self) -> float:
        """Choose every mask anew; returns the share of all entries that changed."""
        if self._options.masks.scope == "global":
            return self._refresh_together()
        changed = torch.zeros((), dtype=torch.int64, device=self.model.device)
        hysteresis = self._options.masks.hysteresis
        for each in self.linears:
            changed += renew_mask(each.mask_OI, each.rows, partial(self._score, each), hysteresis)
        self._ranks.sum([changed])
        return int(changed) / self._weights

    def _refresh_together(self) -> float:
        """Choose all masks by one threshold, the projection of ELSA (arXiv 2510.01650)."""
        hysteresis = self._options.masks.hysteresis

        def scores() -> Iterator[Tensor]:
            for each in self.linears:
                score_OI = favoured(self._score(each, slice(None)), each.mask_OI, hysteresis)
                refuse_nan(score_OI)
                yield score_OI

        ranks = self._ranks
        zeros = ranks.total(sum(int(torch.count_nonzero(~each.mask)) for each in self.linears))
        changed = torch.zeros((), dtype=torch.int64, device=self.model.device)
        lowest = smallest(scores, zeros, gather=ranks.gather, rank=ranks.rank)
        for each, removed_OI in zip(self.linears, lowest, strict=True):
            mask_OI = removed_OI.logical_not_()
            changed += flips(each.mask_OI, mask_OI)
            each.mask_OI.copy_(mask_OI)
        ranks.sum([changed])
        return int(changed) / self._weights

    def _score(self, each: MaskedLinear, rows: slice) -> Tensor:
        """How much some rows of a linear want their weights kept (rows, in)."""
        weight_PI = each.in_rows(each.weight)[rows]
        if self._options.masks.score == "magnitude":
            return magnitude(weight_PI)
        second = self.optimiser.second[f"{each.name}.weight"]
        return sensitivity(weight_PI, each.in_rows(second)[rows])

    def figures(self) -> list[StepFigures]:
        """Return the figures of the steps since the last call.

        Raises:
            SecateurError: a loss or gradient was not finite; the message names the step.
        """
        self._fetch()
        figures, self._figures = self._figures, []
        return figures

    def _fetch(self) -> None:
        pending, self._pending = self._pending, []
        positions = self._options.step_windows * (self._options.length - 1)
        for step, rate, decay, sums in pending:
            entropy, divergence, norm = sums.tolist()
            if not math.isfinite(entropy + divergence + norm):
                raise SecateurError(
                    f"The loss or its gradient is NaN or infinite at step {step}; lower the "
                    "learning rate and start over with --restart."
                )
            self._figures.append(
                StepFigures(step, entropy / positions, divergence / positions, norm, rate, decay)
            )

    def validation_loss(self, windows_WL: Tensor) -> float:
        """Mean negative log-likelihood of held-out windows, nats per token."""
        return held_out_loss(self.holding, windows_WL, self._dtype, self._ranks)

    def remove(self) -> None:
        """Merge what was trained beside the weights, and set all removed ones to zero."""
        for each in self.linears:
            each.merge()
            each.remove()

    def _freeze(self) -> None:
        """From here on the masks stay, and removed weights are and stay zero."""
        if all(each.frozen for each in self.linears):
            return
        resumed = self.done > self._options.frozen_from
        for each in self.linears:
            # A run that goes on behind the freeze has rescaled them before.
            each.remove(rescale=self._options.masks.rescale and not resumed)
            each.frozen = True
        self.optimiser.forget_removed()

    def _accumulate(self, first: int) -> Tensor:
        """Add up the gradients of a step; returns the sums of cross-entropy and divergence (2,)."""
        options = self._options
        device = self.model.device
        sums = torch.zeros(2, device=device)
        share = self._ranks.share(options.step_windows)
        first += share.start
        windows = self._windows_WL[first : first + share.stop - share.start]
        scale = 1 / (options.step_windows * (options.length - 1))
        # One context for the step: autocast keeps the weights it has converted.
        dense = options.masks.forward == "dense" and not self.linears[0].frozen
        with (
            self.holding.masked(dense=dense),
            recomputed(self.holding.blocks, options.activation_checkpointing),
            forward_precision(self._dtype, device),
        ):
            size = options.micro_batch_windows
            for at in range(0, len(windows), size):
                tokens_WL = windows[at : at + size].to(device).long()
                target = None
                if self._teacher is not None:
                    target = self._teacher.targets(first + at, tokens_WL)
                states_WLD = self.holding.forward(
                    partial(self._readout.states, tokens_WL), last=at + size >= len(windows)
                )
                sums += backward_in_parts(
                    states_WLD[:, :-1].flatten(0, 1),
                    tokens_WL[:, 1:].flatten(),
                    self._readout.project,
                    target,
                    self._loss,
                    vocabulary=self.model.config.get_text_config().vocab_size,
                    scale=scale,
                )
        self.holding.collect_gradients()
        self._ranks.sum([sums])
        return sums

    def _clip(self) -> Tensor:
        """Scale all gradients if they are too long together; returns the norm before."""
        parameters = list(self.parameters.values())
        # What all processes have counts once.
        others = () if self._ranks.first else self.holding.replicated
        counted = [p.grad for name, p in self.parameters.items() if name not in others]
        norm = nn.utils.get_total_norm([gradient for gradient in counted if gradient is not None])
        if self._ranks.world > 1:
            square = norm.square()
            self._ranks.sum([square])
            norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, self._options.optimiser.clip, norm)
        return norm


def held_out_loss(
    holding: Holding, windows_WL: Tensor, dtype: torch.dtype, ranks: Ranks = ALONE
) -> float:
    """Mean negative log-likelihood of windows, nats per token; each process takes its share."""
    mine_WL = windows_WL[ranks.deal(len(windows_WL))].long()
    with holding.masked():
        scores = holding.evaluate(lambda: score_windows(holding.model, mine_WL, dtype=dtype))
    return float(ranks.collect(scores.loss_W, len(windows_WL)).mean())
