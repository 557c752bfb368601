"""The loss: next tokens as the text has them, and as the dense model foresees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.evaluation.predictions import kl_divergence
from secateur.runs.limits import rows_at_once

# Logits that exist at one time.
_LOGITS = 2**25
# Those that are gone through at one time, in each of three copies: a processor's cache holds them,
# and the memory of larger temporaries is new each time, which takes longer than to compute them.
_CACHED = 2**18
# Of a smaller probability of the rest, 1 − p of the others leaves too few digits.
_RARE = 1e-2
# Exponents beyond it overflow.
_LARGEST = 60.0


class Target(Protocol):
    """What the teacher foresees at some positions, at the loss's temperature."""

    def part(self, rows: slice) -> Target:
        """The same at some of the positions."""

    def compare(self, scaled_PV: Tensor, total_P: Tensor, student_PV: Tensor) -> Tensor:
        """Return KL(teacher ‖ student) in nats (positions,).

        Args:
            scaled_PV: the student's logits over the temperature.
            total_P: log of the sum of their exponentials.
            student_PV: the student's probabilities, which become the derivative of the divergence
                by the scaled logits.
        """


class Teacher(Protocol):
    """Targets for the windows of the training text."""

    def targets(self, first: int, tokens_WL: Tensor) -> Callable[[slice], Target]:
        """Return what is foreseen at slices of the positions of these windows.

        Positions are those of all windows one behind another, without the last of each window.
        ``first`` is the number of the first window in the training text.
        """


@dataclass(frozen=True)
class FullTarget:
    """Log-probabilities of every token."""

    teacher_PV: Tensor

    def part(self, rows: slice) -> FullTarget:
        return FullTarget(self.teacher_PV[rows])

    def compare(self, scaled_PV: Tensor, total_P: Tensor, student_PV: Tensor) -> Tensor:
        probability_PV = self.teacher_PV.exp()
        student_PV.sub_(probability_PV)
        divergence_P = (self.teacher_PV - scaled_PV).mul_(probability_PV).sum(1)
        # The teacher's probabilities add up to 1.
        return divergence_P + total_P


@dataclass(frozen=True)
class TopTarget:
    """The likeliest tokens one by one, all others as one event, so that the sum stays 1.

    By the log-sum inequality its divergence is at most the full one, and 0 where they agree.

    Attributes:
        teacher_PK: log-probabilities of the likeliest tokens.
        token_PK: which they are, int64.
        rest_P: log of the probability of all others.
    """

    teacher_PK: Tensor
    token_PK: Tensor
    rest_P: Tensor

    @classmethod
    def of_logits(cls, logits_PV: Tensor, temperature: float, count: int) -> TopTarget:
        """Keep the ``count`` likeliest tokens, fewer than the vocabulary has."""
        teacher_PV = (logits_PV.float() / temperature).log_softmax(-1)
        teacher_PK, token_PK = teacher_PV.topk(count, dim=-1)
        rest_P = 1 - teacher_PK.exp().sum(1)
        none_P = torch.zeros_like(rest_P)
        return cls(teacher_PK, token_PK, _log_rest(teacher_PV, none_P, token_PK, rest_P))

    def part(self, rows: slice) -> TopTarget:
        return TopTarget(self.teacher_PK[rows], self.token_PK[rows], self.rest_P[rows])

    def compare(self, scaled_PV: Tensor, total_P: Tensor, student_PV: Tensor) -> Tensor:
        student_PK = scaled_PV.gather(1, self.token_PK) - total_P[:, None]
        top_PK = student_PK.exp()
        student_rest_P = _log_rest(scaled_PV, total_P, self.token_PK, 1 - top_PK.sum(1))
        # What the teacher gives the rest is divided as the student divides its own.
        share_P = (self.rest_P - student_rest_P).clamp_max(_LARGEST).exp()
        student_PV.mul_(1 - share_P[:, None].to(student_PV.dtype))
        student_PV.scatter_(1, self.token_PK, (top_PK - self.teacher_PK.exp()).to(student_PV.dtype))
        divergence_P = kl_divergence(self.teacher_PK, student_PK)
        return divergence_P + self.rest_P.exp() * (self.rest_P - student_rest_P)


def cache_bytes(windows: int, length: int, count: int) -> int:
    """Size of the targets of a text on disk: half, int32 and fp32 numbers of ``TopTarget``."""
    return windows * (length - 1) * (6 * count + 4)


def _log_rest(logit_PV: Tensor, total_P: Tensor, token_PK: Tensor, rest_P: Tensor) -> Tensor:
    """Log of the probability of all tokens but the named ones.

    ``total_P`` is the log of the sum of all exponentials, ``rest_P`` the probability by
    subtraction from 1.
    """
    if logit_PV.device.type != "cpu":
        return _summed_rest(logit_PV, token_PK) - total_P
    # A pass over all tokens is dear; it is needed where the difference would be all rounding.
    rare_P = rest_P < _RARE
    log_rest_P = rest_P.clamp_min(_RARE).log()
    if bool(rare_P.any()):
        summed_P = _summed_rest(logit_PV[rare_P], token_PK[rare_P])
        log_rest_P = log_rest_P.masked_scatter(rare_P, summed_P - total_P[rare_P])
    return log_rest_P


def _summed_rest(logit_PV: Tensor, token_PK: Tensor) -> Tensor:
    """Log of the sum of the exponentials of all tokens but the named ones."""
    return logit_PV.scatter(1, token_PK, float("-inf")).logsumexp(-1)


@dataclass(frozen=True)
class Loss:
    """weight · T² · KL(teacher ‖ student at temperature T) + (1 − weight) · cross-entropy.

    T² keeps the gradient's size independent of T (Hinton et al. 2015, arXiv 1503.02531).

    Attributes:
        weight: of distillation, 0 to 1.
        temperature: T.
    """

    weight: float
    temperature: float

    @torch.no_grad()
    def gradient(
        self,
        logits_PV: Tensor,
        next_P: Tensor,
        target: Target | None,
        spare_2PV: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the parts of the loss and its derivative by the logits.

        Written out, because automatic differentiation would keep and pass over many more tensors
        of this size, and in place, because most of the time would go to new memory.

        Args:
            logits_PV: the student's, fp32; they become the derivative.
            next_P: tokens of the text, int64.
            target: what the teacher foresees; None without a teacher.
            spare_2PV: two tensors of the same shape to work in; made if there are none.

        Returns:
            Cross-entropy and KL summed over positions (2,), and the derivative of the weighted
            sum (positions, vocabulary).
        """
        weight = 0.0 if target is None else self.weight
        logits_PV.sub_(logits_PV.amax(1, keepdim=True))
        divergence = logits_PV.new_zeros(())
        learned_PV = None
        if target is not None:
            if spare_2PV is None:
                spare_2PV = logits_PV.new_empty((2, *logits_PV.shape))
            scaled_PV, learned_PV = spare_2PV
            torch.mul(logits_PV, 1 / self.temperature, out=scaled_PV)
            torch.exp(scaled_PV, out=learned_PV)
            sum_P = learned_PV.sum(1)
            learned_PV.mul_(sum_P.reciprocal()[:, None])
            divergence = target.compare(scaled_PV, sum_P.log(), learned_PV).sum()
        next_P1 = next_P[:, None]
        logit_P = logits_PV.gather(1, next_P1)[:, 0]
        sum_P = logits_PV.exp_().sum(1)
        entropy = (sum_P.log() - logit_P).sum()
        gradient_PV = logits_PV.mul_(((1 - weight) / sum_P)[:, None])
        gradient_PV.scatter_add_(1, next_P1, torch.full_like(gradient_PV[:, :1], weight - 1))
        if learned_PV is not None:
            # T² of the loss, and 1/T from the logits being divided by it.
            gradient_PV.add_(learned_PV, alpha=weight * self.temperature)
        return torch.stack([entropy, divergence.to(entropy)]), gradient_PV


def backward_in_parts(
    states_PD: Tensor,
    next_P: Tensor,
    project: Callable[[Tensor], Tensor],
    target: Callable[[slice], Target] | None,
    loss: Loss,
    *,
    vocabulary: int,
    scale: float,
) -> Tensor:
    """Go from states to loss and back, a few positions at a time.

    Each part's logits are gone before the next part's are made. Gradients of the output head add
    up; those of the states go back through the decoder at once.

    Args:
        states_PD: last hidden states, part of a graph.
        next_P: the token to predict at each position.
        project: from states to logits.
        target: what the teacher foresees at a slice of the positions; None without a teacher.
        loss: how to judge.
        vocabulary: tokens in it.
        scale: of the gradient; one over the positions of the whole step.

    Returns:
        Sums over the positions (2,): cross-entropy and KL, in nats.
    """
    gradients = []
    sums = torch.zeros(2, device=states_PD.device)
    step = rows_at_once(_LOGITS, vocabulary)
    few = max(1, _CACHED // vocabulary) if states_PD.device.type == "cpu" else step
    work_3PV = states_PD.new_empty((3, min(few, len(next_P)), vocabulary), dtype=torch.float32)
    for at in range(0, len(next_P), step):
        part = slice(at, at + step)
        state_PD = states_PD[part].detach().requires_grad_()
        logits_PV = project(state_PD)
        judge = None if target is None else target(part)
        gradient_PV = torch.empty_like(logits_PV)
        for start in range(0, len(logits_PV), few):
            rows = slice(start, start + few)
            logit_PV = logits_PV.detach()[rows]
            work = work_3PV[:, : len(logit_PV)]
            found, slope_PV = loss.gradient(
                work[0].copy_(logit_PV),
                next_P[part][rows],
                None if judge is None else judge.part(rows),
                work[1:],
            )
            gradient_PV[rows] = slope_PV.mul_(scale)
            sums += found
        logits_PV.backward(gradient_PV)
        assert state_PD.grad is not None, "the loss depends on every state"
        gradients.append(state_PD.grad)
    states_PD.backward(torch.cat(gradients))
    return sums
