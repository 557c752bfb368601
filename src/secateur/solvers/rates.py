"""Pruning rates of rows: candidates, learned distributions over them, and exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from secateur.runs.errors import SecateurError

# A candidate step is read as the closest fraction with a denominator up to this: 0.01 is 1/100.
_FINEST_STEP = 10_000
# Halvings of an interval of shifts, after which it is as short as float64 allows.
_BISECTIONS = 60
# Rates further out than this are not told apart: float64 could not add a shift to them exactly.
_FURTHEST_RATE = 1000.0


def candidate_rates(step: float = 0.01) -> tuple[Fraction, ...]:
    """Pruning rates 1, 1 − step, … down to 0 (Xu et al. 2024, arXiv 2402.16880, sec. 3.2).

    Exact fractions, so that the weights each of them removes can be counted without rounding.

    Raises:
        SecateurError: ``step`` is not in [0.0001, 1].
    """
    if not 1 / _FINEST_STEP <= step <= 1:
        raise SecateurError(
            f"a step of {step} between pruning rates is not in [{1 / _FINEST_STEP}, 1]; "
            "give one such as 0.01"
        )
    exact = Fraction(step).limit_denominator(_FINEST_STEP)
    return (*(1 - exact * index for index in range(-(-1 // exact))), Fraction(0))


def candidate_counts(rates: Sequence[Fraction], columns: int) -> list[int]:
    """Weights that each rate removes from a row of ``columns``: the whole part of their product."""
    return [int(columns * rate) for rate in rates]


def rate_distribution(theta_GD: Tensor, *, smooth: bool) -> Tensor:
    """Turn logits into beta_GD, the probability of each candidate rate.

    The backward pass computes it again, so that nothing of the logits' size is kept beside them.

    Args:
        theta_GD: Logits, one row for each distribution.
        smooth: Put a sigmoid before the softmax, as the released code does. No probability then
            exceeds another by more than a factor of e, which bounds the expected rate
            (``reachable_rates``). Without it every rate can be reached.
    """
    beta_GD: Tensor = checkpoint(
        _softmax, theta_GD, smooth, use_reentrant=False, preserve_rng_state=False
    )
    return beta_GD


def _softmax(theta_GD: Tensor, smooth: bool) -> Tensor:
    return torch.softmax(theta_GD.sigmoid() if smooth else theta_GD, dim=-1)


def reachable_rates(rates: Sequence[Fraction], *, smooth: bool) -> tuple[float, float]:
    """Limits of the expected rate under ``rate_distribution``.

    The highest expected rate gives rates above some cut e times the weight of the others. With
    101 candidates and ``smooth`` the limits are 0.3763 and 0.6237.
    """
    if not smooth:
        return float(min(rates)), float(max(rates))

    def highest(descending: torch.Tensor) -> float:
        above = torch.cat([descending.new_zeros(1), descending.cumsum(0)])
        cut = torch.arange(len(above), dtype=torch.float64)
        gain = torch.e - 1
        return float(((above[-1] + gain * above) / (len(descending) + gain * cut)).max())

    descending = torch.tensor([float(rate) for rate in rates], dtype=torch.float64)
    return 1 - highest(1 - descending.flip(0)), highest(descending)


def expected_rate(beta_GD: Tensor, rates: Sequence[Fraction]) -> Tensor:
    """alpha_G = Σ_d beta_d · p_d, fp32.

    The sum is in float64 and around the mean rate: a uniform distribution gives the mean rate
    exactly, and rounding never takes a weight off a row.
    """
    rate_D = torch.tensor([float(rate) for rate in rates], dtype=torch.float64)
    mean = float(sum(rates) / len(rates))
    centred_D = (rate_D - mean).to(beta_GD.device)
    return (beta_GD.double() @ centred_D + mean).float()


def rows_per_distribution(rows: int, distributions: int) -> int:
    """How many consecutive rows share a distribution.

    Raises:
        SecateurError: The rows cannot be shared out evenly.
    """
    if distributions < 1 or rows % distributions:
        raise SecateurError(
            f"{rows} rows cannot share {distributions} pruning rates evenly; "
            "let the number of rows that share one divide the rows of the linear"
        )
    return rows // distributions


def truncated_counts(alpha_G: Tensor, rows: int, columns: int) -> Tensor:
    """count_R = trunc(alpha · columns), int64, as the released code rounds.

    Each of the rates alpha_G, in [0, 1], serves rows / G consecutive rows.

    Raises:
        SecateurError: G does not divide the rows.
    """
    shared = rows_per_distribution(rows, len(alpha_G))
    count_G = (alpha_G.detach().float() * columns).long().clamp_(0, columns)
    return count_G.repeat_interleave(shared)


def mean_rate(alphas: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Mean of the linears' mean rates, weighted by their numbers of weights; differentiable."""
    terms = [alpha.mean() * (size / sum(sizes)) for alpha, size in zip(alphas, sizes, strict=True)]
    return torch.stack(terms).sum()


def sparsity_penalty(rate: Tensor, target: float, weight: float) -> Tensor:
    """weight · ((rate − target) / target)², the sparsity term of BESA as it was released.

    Raises:
        SecateurError: the target is not in (0, 1].
    """
    if not 0 < target <= 1:
        raise SecateurError(f"a target rate of {target} is not in (0, 1]; give a sparsity above 0")
    return weight * ((rate - target) / target).square()


def exact_counts(rate_R: Tensor, columns_R: Tensor, total: int) -> Tensor:
    """Zeros of all rows that follow given rates and add up to ``total``.

    One shift τ, found by bisection, is added to all rates, so that
    x_r = columns_r · clip(rate_r + τ, 0, 1) sums to the total. What the whole parts of x leave
    over goes, one by one, to the rows with the largest fractions, ties to earlier rows.

    Args:
        rate_R: Finite rates of the rows of any linears, which need not lie in [0, 1].
        columns_R: Width of each row's linear, integers.
        total: Zeros of all rows together.

    Returns:
        count_R, int64, 0 <= count_r <= columns_r.

    Raises:
        SecateurError: The total does not fit in the rows, or a rate is not finite.
    """
    weights = int(columns_R.sum())
    if not 0 <= total <= weights:
        raise SecateurError(f"{total} zeros do not fit in {weights} weights; lower the sparsity")
    if not len(rate_R):
        return columns_R.long()
    rate_R = rate_R.detach().double()
    if not bool(rate_R.isfinite().all()):
        raise SecateurError("a pruning rate is NaN or infinite; lower the learning rate")
    rate_R = rate_R.clamp(-_FURTHEST_RATE, _FURTHEST_RATE)
    columns_R = columns_R.long()
    size_R = columns_R.double()

    def shares(shift: Tensor) -> Tensor:
        return (rate_R + shift).clamp_(0, 1).mul_(size_R)

    # At the lower end no row has a zero, at the upper end all have only zeros.
    low, high = -rate_R.amax(), 1 - rate_R.amin()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = shares(middle).sum() >= total
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    share_R = shares(high)
    count_R = torch.minimum(share_R.long(), columns_R)
    fraction_R = (share_R - count_R).masked_fill_(count_R == columns_R, -1)
    missing = total - count_R.sum()
    order_R = fraction_R.argsort(descending=True, stable=True)
    first_R = torch.arange(len(order_R), device=order_R.device) < missing
    return count_R.scatter_add_(0, order_R, first_R.long())
