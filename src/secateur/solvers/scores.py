"""Pruning scores that need no solve, of weights and of the units of an output matrix."""

from __future__ import annotations

from torch import Tensor

from secateur.runs.errors import SecateurError


def magnitude_score(w_OI: Tensor) -> Tensor:
    """|W|, the change of a weight that is set to zero."""
    return w_OI.abs()


def wanda_score(w_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """|W| times the root mean square of its input (Sun et al. 2023, arXiv 2306.11695, eq. 1)."""
    return w_OI.abs().mul_(mean_square_I.clamp_min(0).sqrt())


def wanda_columns(w_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """score_I: mean over outputs of |W_ij| times the root mean square of the input.

    The prior of Bonsai (Dery et al. 2024, arXiv 2402.05406) that its released code uses, and the
    structured Wanda that papers compare with. ``w_OI`` is the output matrix of a sub-block.
    """
    return wanda_score(w_OI, mean_square_I).mean(0)


def fluctuation_columns(w_OI: Tensor, variance_I: Tensor) -> Tensor:
    """score_I: variance of the input times the squared norm of its column.

    WIFV of FLAP (An et al. 2023, arXiv 2312.11983): what is lost once the mean of a removed input
    has gone into the bias. ``w_OI`` is the output matrix of a sub-block.
    """
    return w_OI.square().sum(0) * variance_I


def unit_means(score_I: Tensor, unit: int) -> Tensor:
    """score_U: mean over the consecutive columns of each unit.

    Applied to mean absolute inputs it is Bonsai's magnitude prior.

    Raises:
        SecateurError: Units do not fill the columns.
    """
    check_units(len(score_I), unit)
    return score_I.view(-1, unit).mean(1)


def check_units(columns: int, unit: int) -> None:
    """Raise SecateurError if units do not fill the columns."""
    if unit < 1 or columns % unit:
        raise SecateurError(
            f"{columns} columns cannot be divided into units of {unit}; let the unit divide them"
        )
