"""The loss: next tokens as the text has them, and as the dense model foresees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.evaluation.divergence import kl_divergence

# Logits that exist at one time, in each of a few copies.
_LOGITS = 2**25
# Of a smaller probability of the rest, 1 − p of the others leaves too few digits.
_RARE = 1e-2
# Exponents beyond it overflow.
_LARGEST = 60.0


class Target(Protocol):
    """What the teacher foresees at some positions, at the loss's temperature."""

    def divergence(self, student_PV: Tensor) -> Tensor:
        """KL(teacher ‖ student) in nats (positions,), given the student's log-probabilities."""

    def compare(self, student_PV: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence, and its derivative by the logits behind the log-probabilities.

        The second is (positions, vocabulary).
        """


@dataclass(frozen=True)
class FullTarget:
    """Log-probabilities of every token."""

    teacher_PV: Tensor

    def divergence(self, student_PV: Tensor) -> Tensor:
        return kl_divergence(self.teacher_PV, student_PV)

    def compare(self, student_PV: Tensor) -> tuple[Tensor, Tensor]:
        gradient_PV = student_PV.exp().sub_(self.teacher_PV.exp())
        return self.divergence(student_PV), gradient_PV


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
        return cls(teacher_PK, token_PK, _log_rest(teacher_PV, token_PK))

    def divergence(self, student_PV: Tensor) -> Tensor:
        return self._divergence(
            student_PV.gather(1, self.token_PK), _log_rest(student_PV, self.token_PK)
        )

    def compare(self, student_PV: Tensor) -> tuple[Tensor, Tensor]:
        student_PK = student_PV.gather(1, self.token_PK)
        student_rest_P = _log_rest(student_PV, self.token_PK)
        # What the teacher gives the rest is divided as the student divides its own.
        share_P = (self.rest_P - student_rest_P).clamp_max(_LARGEST).exp()
        gradient_PV = student_PV.exp().mul_(1 - share_P[:, None])
        top_PK = student_PK.exp() - self.teacher_PK.exp()
        gradient_PV.scatter_(1, self.token_PK, top_PK.to(gradient_PV.dtype))
        return self._divergence(student_PK, student_rest_P), gradient_PV

    def _divergence(self, student_PK: Tensor, student_rest_P: Tensor) -> Tensor:
        top_P = kl_divergence(self.teacher_PK, student_PK)
        return top_P + self.rest_P.exp() * (self.rest_P - student_rest_P)


def _log_rest(log_p_PV: Tensor, token_PK: Tensor) -> Tensor:
    """Log of the probability of all tokens but the named ones."""
    if log_p_PV.device.type != "cpu":
        return _summed_rest(log_p_PV, token_PK)
    # A pass over all tokens is dear; it is needed where the difference would be all rounding.
    rest_P = 1 - log_p_PV.gather(1, token_PK).exp().sum(1)
    rare_P = rest_P < _RARE
    log_rest_P = rest_P.clamp_min(_RARE).log()
    if bool(rare_P.any()):
        summed_P = _summed_rest(log_p_PV[rare_P], token_PK[rare_P])
        log_rest_P = log_rest_P.masked_scatter(rare_P, summed_P)
    return log_rest_P


def _summed_rest(log_p_PV: Tensor, token_PK: Tensor) -> Tensor:
    return log_p_PV.scatter(1, token_PK, float("-inf")).logsumexp(-1)


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
        self, logits_PV: Tensor, next_P: Tensor, target: Target | None
    ) -> tuple[Tensor, Tensor]:
        """Return the parts of the loss and its derivative by the logits.

        Written out, because automatic differentiation would keep and pass over many more tensors
        of this size.

        Args:
            logits_PV: the student's, fp32.
            next_P: tokens of the text, int64.
            target: what the teacher foresees; None without a teacher.

        Returns:
            Cross-entropy and KL summed over positions (2,), and the derivative of the weighted
            sum (positions, vocabulary).
        """
        weight = 0.0 if target is None else self.weight
        log_p_PV = logits_PV.log_softmax(-1)
        next_P1 = next_P[:, None]
        entropy = -log_p_PV.gather(1, next_P1).sum()
        divergence = torch.zeros_like(entropy)
        learned_PV = None
        if target is not None:
            at_temperature_PV = log_p_PV
            if self.temperature != 1:
                at_temperature_PV = (logits_PV / self.temperature).log_softmax(-1)
            divergence_P, learned_PV = target.compare(at_temperature_PV)
            divergence = divergence_P.sum()
            # T² of the loss, and 1/T from the logits being divided by it.
            learned_PV.mul_(weight * self.temperature)
        gradient_PV = log_p_PV.exp_().mul_(1 - weight)
        gradient_PV.scatter_add_(1, next_P1, torch.full_like(gradient_PV[:, :1], weight - 1))
        if learned_PV is not None:
            gradient_PV += learned_PV
        return torch.stack([entropy, divergence]), gradient_PV


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

    Each part's logits are gone before the next part's are made; gradients of the output head add
    up, and those of the states are then sent back through the decoder at once.

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
    step = max(1, _LOGITS // vocabulary)
    for at in range(0, len(next_P), step):
        part = slice(at, at + step)
        state_PD = states_PD[part].detach().requires_grad_()
        logits_PV = project(state_PD)
        parts, gradient_PV = loss.gradient(
            logits_PV.float(), next_P[part], None if target is None else target(part)
        )
        logits_PV.backward(gradient_PV.mul_(scale).to(logits_PV.dtype))
        sums += parts
        assert state_PD.grad is not None, "the loss depends on every state"
        gradients.append(state_PD.grad)
    states_PD.backward(torch.cat(gradients))
    return sums
