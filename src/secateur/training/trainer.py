"""The training loop: steps, masks, validation; no files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import SecateurError
from secateur.evaluation.readout import find_readout
from secateur.evaluation.scores import score_windows
from secateur.training.distillation import Loss, backward_in_parts
from secateur.training.masked_linear import MaskedLinear, masked_forward
from secateur.training.masks import choose_mask, flips, magnitude, sensitivity
from secateur.training.optimiser import MaskedAdamW
from secateur.training.options import Training
from secateur.training.ranks import ALONE, Ranks
from secateur.training.schedule import learning_rate_share, ramp
from secateur.training.teacher import Teacher
from secateur.walk.precision import forward_precision


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


@dataclass
class _Pending:
    """A step whose figures are still on the device."""

    step: int
    learning_rate: float
    decay: float
    sums: Tensor


class Trainer:
    """Trains a model whose linears are masked, a step at a time.

    Attributes:
        parameters: what is trained, by name; fp32.
        linears: those with a mask.
        optimiser: with the steps done so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: Sequence[MaskedLinear],
        teacher: Teacher | None,
        windows_WL: Tensor,
        options: Training,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.model = model
        self.linears = linears
        # What the options say, unless the caller says it.
        self.parameters = (
            trained_parameters(model, linears, options) if parameters is None else parameters
        )
        self._teacher = teacher
        self._windows_WL = windows_WL
        self._options = options
        self._dtype = dtype
        self._ranks = ranks
        self._loss = Loss(
            options.distillation.weight if teacher else 0.0, options.distillation.temperature
        )
        self._weights = sum(each.mask.numel() for each in linears)
        self._pending: list[_Pending] = []
        self._figures: list[StepFigures] = []
        masked = {f"{each.name}.weight": each.mask for each in linears}
        chosen = options.optimiser
        self.optimiser = MaskedAdamW(
            self.parameters,
            {name: mask for name, mask in masked.items() if name in self.parameters},
            betas=chosen.betas,
            epsilon=chosen.epsilon,
            weight_decay=chosen.weight_decay,
            decay_place=options.decay.place,
            second_moment=chosen.second_moment,
        )
        with masked_forward(linears):
            self._readout = find_readout(model, windows_WL[:1])
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @property
    def done(self) -> int:
        """Steps done."""
        return self.optimiser.steps

    def step(self) -> None:
        """Do the next step; its figures wait on the device until they are asked for."""
        options = self._options
        step = self.done
        frozen = step >= options.frozen_from
        if frozen:
            self._freeze()
        sums = self._accumulate(step * options.step_windows)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), options.optimiser.clip)
        rate = options.optimiser.learning_rate * learning_rate_share(
            step,
            options.steps,
            warm_up=options.optimiser.warm_up,
            tail=options.optimiser.tail,
            floor=options.optimiser.floor,
        )
        risen = ramp(step, options.steps, options.decay.ramp_share)
        decay = 0.0 if frozen else options.decay.strength * risen
        self.optimiser.step(rate, decay)
        for parameter in self.parameters.values():
            parameter.grad = None
        self._pending.append(_Pending(self.done, rate, decay, torch.cat([sums, norm[None]])))
        if self.done % options.masks.refresh_steps == 0 and self.done < options.frozen_from:
            # A loss that is not finite is told by its step before it spoils a score.
            self._fetch()
            self._figures[-1] = replace(self._figures[-1], flip_rate=self.refresh())

    @torch.no_grad()
    def refresh(self) -> float:
        """Choose every mask anew; returns the share of all entries that changed."""
        options = self._options.masks
        changed = torch.zeros((), dtype=torch.int64, device=self.model.device)
        for each in self.linears:
            if options.score == "magnitude":
                score = magnitude(each.weight)
            else:
                score = sensitivity(each.weight, self.optimiser.second[f"{each.name}.weight"])
            score_OI = score.T if each.linear.transposed else score
            mask_OI = choose_mask(score_OI, each.rows, each.mask_OI, options.hysteresis)
            changed += flips(each.mask_OI, mask_OI)
            each.replace_mask(mask_OI)
        return int(changed) / self._weights

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
        for each in pending:
            entropy, divergence, norm = each.sums.tolist()
            if not math.isfinite(entropy + divergence + norm):
                raise SecateurError(
                    f"The loss or its gradient is NaN or infinite at step {each.step}; "
                    "lower the learning rate and start over with --restart."
                )
            self._figures.append(
                StepFigures(
                    each.step,
                    cross_entropy=entropy / positions,
                    divergence=divergence / positions,
                    gradient_norm=norm,
                    learning_rate=each.learning_rate,
                    decay=each.decay,
                )
            )

    def validation_loss(self, windows_WL: Tensor) -> float:
        """Mean negative log-likelihood of held-out windows, nats per token."""
        with masked_forward(self.linears):
            scores = score_windows(self.model, windows_WL.long(), dtype=self._dtype)
        return float(scores.loss_W.mean())

    def remove(self) -> None:
        """Set all removed weights to zero."""
        for each in self.linears:
            each.remove()

    def _freeze(self) -> None:
        """From here on the masks stay, and removed weights are zero and stay so."""
        if all(each.frozen for each in self.linears):
            return
        self.remove()
        self.optimiser.forget_removed()
        for each in self.linears:
            each.frozen = True

    def _accumulate(self, first: int) -> Tensor:
        """Gradients of one step's windows; sums of cross-entropy and divergence (2,).

        With several processes each goes through its share of the windows, and all have the sums.
        """
        options = self._options
        device = self.model.device
        sums = torch.zeros(2, device=device)
        share = self._ranks.share(options.step_windows)
        first += share.start
        windows = self._windows_WL[first : first + share.stop - share.start]
        scale = 1 / (options.step_windows * (options.length - 1))
        # One context for the step: autocast keeps the weights it has converted.
        with masked_forward(self.linears), forward_precision(self._dtype, device):
            for at, tokens in _batches(windows, options.micro_batch_windows):
                tokens_WL = tokens.to(device).long()
                target = (
                    self._teacher.targets(first + at, tokens_WL)
                    if self._teacher is not None
                    else None
                )
                states_PD = self._readout.states(tokens_WL)[:, :-1].flatten(0, 1)
                sums += backward_in_parts(
                    states_PD,
                    tokens_WL[:, 1:].flatten(),
                    self._readout.project,
                    target,
                    self._loss,
                    vocabulary=self.model.config.get_text_config().vocab_size,
                    scale=scale,
                )
        self._ranks.sum([sums, *self._gradients()])
        return sums

    def _gradients(self) -> Iterator[Tensor]:
        """Gradients in an order common to all processes, zero where one has none."""
        if self._ranks.world == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            yield parameter.grad


def trained_parameters(
    model: PreTrainedModel, linears: Sequence[MaskedLinear], options: Training
) -> Mapping[str, nn.Parameter]:
    """What is trained, by name: parameters of the model, then those of low-rank products."""
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if options.train == "all" or parameter.ndim == 1
    }
    for each in linears:
        if each.low_rank is not None:
            parameters[f"{each.name}.low_rank.s"] = each.low_rank.s_OR
            if each.low_rank.x_RI.requires_grad:
                parameters[f"{each.name}.low_rank.x"] = each.low_rank.x_RI
    return parameters


def _batches(windows_WL: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for at in range(0, len(windows_WL), size):
        yield at, windows_WL[at : at + size]
