"""What each part of a model is worth, from the utilities of models that lack some of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.runs.errors import SecateurError
from secateur.solvers.gram import check_finite

# Ridge weights to choose from, relative to the mean eigenvalue of the kernel.
_RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-16, 9))
# Residuals are clipped to this many standard deviations.
_CLIP = 3.0
# Standard deviation of a normal distribution whose median absolute deviation is 1.
_DEVIATIONS = 1.4826
# Most rounds of clipping; a change below this share of the utilities' spread ends them.
_ROUNDS = 100
_SETTLED = 1e-6
# Residuals below this fraction of the spread are never clipped.
_EXACT = 1e-6
# Least diagonal entry that is divided by; below it lies rounding.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class UtilityFit:
    """A linear model of utilities; all in float64.

    Attributes:
        coefficients_M: Utility of each column of the design.
        intercept: Utility where the design is zero.
        left_out_N: Utility less the prediction of the fit to all other observations; NaN for NaN.
        clipped_N: bool, True where that residual was too large to count in full.
    """

    coefficients_M: Tensor
    intercept: float
    left_out_N: Tensor
    clipped_N: Tensor


def fit_utilities(design_NM: Tensor, utilities_N: Tensor) -> UtilityFit:
    """Ridge regression with an intercept: u ≈ b + D β, all columns penalised alike.

    There may be far more columns than observations: what is solved is the N × N problem in the
    kernel D Dᵀ. In its eigenvectors the restricted likelihood (Patterson & Thompson 1971) of any
    ridge weight is a closed form, and the best of a grid is taken; generalised cross-validation
    costs the same but now and then follows the noise. Large leave-one-out residuals are clipped
    (Huber), so that one bad sub-model does not decide the fit.

    With more columns than observations coefficients are shrunk: the fit can tell a few strong
    columns from the rest, but cannot rank many weak ones.

    Args:
        design_NM: Which columns each sub-model has, in any coding; finite.
        utilities_N: Utility or loss of each. An infinite one counts as the furthest finite one on
            its side; one that is NaN is left out.

    Raises:
        SecateurError: The design is not finite, or fewer than two utilities are.
    """
    ones_N1 = torch.ones_like(design_NM[:, :1])
    penalised_M, fixed_P, left_out_N, clipped_N = _robust_ridge(design_NM, ones_N1, utilities_N)
    return UtilityFit(penalised_M, float(fixed_P[0]), left_out_N, clipped_N)


def fit_with_prior(
    design_NK: Tensor, utilities_N: Tensor, prior_K: Tensor, intercept: bool = True
) -> UtilityFit:
    """Ridge regression towards a multiple of a prior: β_k = prior_k · (γ + ε_k).

    The scale γ is common to all columns and free, since a local loss is measured in other units
    than a utility; each column's own deviation ε_k is penalised. With few or noisy observations
    β is proportional to the prior, with many it follows them. This is the posterior mean for
    ε_k ~ N(0, τ²), with τ picked by the restricted likelihood.

    Args:
        design_NK: How much of each column a sub-model has; with the local losses at the widths of
            its sub-blocks as the design, the prior is 1 for all.
        utilities_N: As in ``fit_utilities``.
        prior_K: What the coefficients are expected to be proportional to.
        intercept: Whether utility may differ from 0 where the design is zero.

    Raises:
        SecateurError: As in ``fit_utilities``, or the prior is not finite.
    """
    check_finite("the prior's entries", prior_K)
    relative_NK = design_NK.double() * prior_K
    fixed_NP = relative_NK.sum(1, keepdim=True)
    if intercept:
        fixed_NP = torch.cat([fixed_NP, torch.ones_like(fixed_NP)], dim=1)
    deviation_K, fixed_P, left_out_N, clipped_N = _robust_ridge(relative_NK, fixed_NP, utilities_N)
    constant = float(fixed_P[1]) if intercept else 0.0
    return UtilityFit(prior_K * (fixed_P[0] + deviation_K), constant, left_out_N, clipped_N)


def _robust_ridge(
    design_NM: Tensor, fixed_NP: Tensor, utilities_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Penalised and free coefficients, leave-one-out residuals, and which of them are clipped."""
    check_finite("the design's entries", design_NM)
    target_U, usable_N = _usable(utilities_N.double())
    design_UM = design_NM[usable_N].double()
    problem = _RidgeProblem(design_UM @ design_UM.T, fixed_NP[usable_N].double())
    spread = _typical_size(target_U - target_U.median())
    pulled_U = target_U
    for _ in range(_ROUNDS):
        fit = problem.solve(pulled_U)
        predicted_U = pulled_U - fit.left_out_N
        left_out_U = target_U - predicted_U
        limit = _CLIP * _DEVIATIONS * left_out_U.abs().median().clamp_min(_EXACT * spread)
        before_U, pulled_U = pulled_U, predicted_U + left_out_U.clamp(-limit, limit)
        if bool((pulled_U - before_U).abs().max() <= _SETTLED * spread):
            break
    left_out_N = torch.full_like(utilities_N, torch.nan, dtype=torch.float64)
    left_out_N[usable_N] = left_out_U
    return design_UM.T @ fit.dual_N, fit.fixed_P, left_out_N, left_out_N.abs() > limit


def _typical_size(values_N: Tensor) -> Tensor:
    """Median absolute value, or the mean one if most are zero."""
    size_N = values_N.abs()
    return torch.where(size_N.median() > 0, size_N.median(), size_N.mean())


def _usable(utilities_N: Tensor) -> tuple[Tensor, Tensor]:
    """Utilities that are not NaN, made finite, and which ones they are."""
    finite_N = utilities_N[utilities_N.isfinite()]
    if len(finite_N) < 2:
        raise SecateurError(
            f"{len(finite_N)} of {len(utilities_N)} utilities are finite and at least two are "
            "needed; cut less from the sub-models"
        )
    usable_N = ~utilities_N.isnan()
    return utilities_N[usable_N].clamp(*finite_N.aminmax()), usable_N


@dataclass(frozen=True)
class _Ridge:
    """A solution; penalised coefficients are Dᵀ dual_N."""

    dual_N: Tensor
    fixed_P: Tensor
    left_out_N: Tensor


class _RidgeProblem:
    """Ridge on a design D beside free coefficients of F, for any target.

    With Q the projection off the columns of F:

        y ≈ F γ + D β,   Q D Dᵀ Q = V diag(e) Vᵀ,   β = Dᵀ Q V (e + λ)⁻¹ Vᵀ Q y.

    The residual is V λ/(e + λ) Vᵀ Q y. Divided by the diagonal of that matrix, its entries are the
    leave-one-out residuals.
    """

    def __init__(self, kernel_NN: Tensor, fixed_NP: Tensor) -> None:
        self.kernel_NN = kernel_NN
        self.fixed_NP = fixed_NP
        self.inverse_PN = torch.linalg.pinv(fixed_NP)
        self.onto_NN = fixed_NP @ self.inverse_PN
        self.off_NN = torch.eye(len(kernel_NN)).to(kernel_NN) - self.onto_NN
        value_N, self.vector_NN = torch.linalg.eigh(self.off_NN @ kernel_NN @ self.off_NN)
        noise = torch.finfo(value_N.dtype).eps * value_N.sum()
        self.value_N = value_N.where(value_N > noise, 0)
        mean = self.value_N.mean()
        self.ridge_L = torch.where(mean > 0, mean, 1) * torch.tensor(_RIDGES).to(mean)

    def solve(self, target_N: Tensor) -> _Ridge:
        share_N = self.vector_NN.T @ (self.off_NN @ target_N)
        ridge = self.most_likely(share_N)
        # Directions that no column of the design explains are all residual.
        solved_N = (share_N / (self.value_N + ridge)).where(self.value_N > 0, 0)
        dual_N = self.off_NN @ (self.vector_NN @ solved_N)
        rest_N = target_N - self.kernel_NN @ dual_N
        fixed_P = self.inverse_PN @ rest_N
        through_N = self.vector_NN.square() @ (ridge / (self.value_N + ridge))
        own_N = (through_N - self.onto_NN.diagonal()).clamp_min(_ROUNDING)
        return _Ridge(dual_N, fixed_P, (rest_N - self.fixed_NP @ fixed_P) / own_N)

    def most_likely(self, share_N: Tensor) -> Tensor:
        """The λ of the grid with the highest restricted likelihood.

        For Q y ~ N(0, σ² Q (D Dᵀ/λ + I) Q) and the best σ² it is, times −2 and but for a
        constant, n log Σ s²/(e + λ) + Σ log(e + λ), both over the n directions off F.
        """
        fixed = self.onto_NN.trace().round()
        sum_LN = self.value_N + self.ridge_L[:, None]
        misfit_L = (share_N.square() / sum_LN).sum(1)
        misfit_L = misfit_L.clamp_min(torch.finfo(misfit_L.dtype).tiny)
        directions = len(share_N) - fixed
        volume_L = sum_LN.log().sum(1) - fixed * self.ridge_L.log()
        return self.ridge_L[(directions * misfit_L.log() + volume_L).argmin()]
