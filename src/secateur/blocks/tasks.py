"""What stages work on: a dense block, linears that share their input, a block as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from secateur.models.structure import Linear, find_linears
from secateur.patterns.pattern import Budget, Pattern, Unstructured
from secateur.runs.errors import SecateurError
from secateur.solvers.block_loss import state_error
from secateur.solvers.gram import SparseSolution
from secateur.solvers.grids import Clipping, GridOptions, QuantizedSolution

Needs = Literal["nothing", "norms", "gram"]
Reference = Literal["pruned", "dense"]


@dataclass(frozen=True)
class InputStatistics:
    """What calibration text says about the inputs of a group of linears.

    Attributes:
        tokens: how many token vectors were seen.
        mean_square_I: mean of the squared inputs per column, fp32.
        gram_II: mean of x xᵀ over tokens, fp32; None if it was not asked for.
    """

    tokens: int
    mean_square_I: Tensor
    gram_II: Tensor | None


class BlockInputs(Protocol):
    """Hidden states that enter a block, and how it runs on them: what a task needs of a stream."""

    x_SLD: Tensor
    device: torch.device

    @property
    def fitted(self) -> int: ...

    @property
    def judged(self) -> list[slice]: ...

    def call(self, block: nn.Module, x_BLD: Tensor) -> Tensor: ...

    def precision(self) -> AbstractContextManager[object]: ...


@dataclass
class DenseTask:
    """A dense block, before any of its weights is chosen.

    Attributes:
        block: the module itself, fp32.
        groups: its prunable linears by shared input, in the order of execution.
        pattern: what masks will look like.
        mean_squares: mean squared inputs of the linears by column, by name.
        run: runs the block in fp32 on a window of calibration text and returns its output.
        generator: for every random choice.
        notes: sentences for the report.
    """

    block: nn.Module
    groups: Sequence[Sequence[Linear]]
    pattern: Pattern
    mean_squares: dict[str, Tensor]
    run: Callable[[], Tensor]
    generator: torch.Generator
    notes: list[str] = field(default_factory=list)


@dataclass
class GroupTask:
    """The linears of one group, rows stacked, and all that is known about their input.

    Attributes:
        names: names of the linears inside the block, in stacking order.
        dense_OI: their original weights, fp32; stages must not write into it.
        w_OI: their weights as the stages so far left them.
        budget: what the mask must look like.
        statistics: of the inputs, over the fitted calibration tokens.
        held_out_NI: inputs of tokens that nothing was fitted on, in the dtype of forward passes.
        mask_OI: True = kept; None until a stage has chosen a mask.
        stored: dtype that weights are saved in.
        clipping: learned ranges of the grid to come, if a stage learned them.
        quantized: the weights as levels of a grid, once a stage has quantised them.
        notes: sentences for the report: fallbacks used, updates rejected.
        rejected: of how many linears a stage's update was, by its name.
    """

    names: tuple[str, ...]
    dense_OI: Tensor
    w_OI: Tensor
    budget: Budget
    statistics: InputStatistics
    held_out_NI: Tensor
    mask_OI: Tensor | None = None
    stored: torch.dtype = torch.float32
    clipping: Clipping | None = None
    quantized: QuantizedSolution | None = None
    notes: list[str] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def gram_II(self) -> Tensor:
        """The Gram matrix of the inputs; stages that use it declare that they need it."""
        assert self.statistics.gram_II is not None
        return self.statistics.gram_II

    @property
    def blind(self) -> bool:
        """No calibration token reached these linears."""
        return self.statistics.tokens == 0

    def row_slices(self) -> list[slice]:
        """Where each linear's rows are in the stack."""
        ends = torch.tensor(self.budget.rows).cumsum(0).tolist()
        return [slice(end - rows, end) for rows, end in zip(self.budget.rows, ends, strict=True)]

    def held_out_errors(self, w_OI: Tensor, reference_OI: Tensor | None = None) -> list[float]:
        """Squared output error of each linear with weights ``w_OI``, on held-out tokens.

        It is the distance from the output of the reference weights, the dense ones by default,
        relative to the power of the dense output.
        """
        if len(self.held_out_NI) == 0:
            return [float("nan")] * len(self.names)
        error_O = self._held_out_power(
            w_OI - (self.dense_OI if reference_OI is None else reference_OI)
        )
        tiny = torch.finfo(torch.float32).tiny
        return [
            (error_O[rows].sum() / self._dense_power_O[rows].sum().clamp_min(tiny)).item()
            for rows in self.row_slices()
        ]

    @cached_property
    def _dense_power_O(self) -> Tensor:
        return self._held_out_power(self.dense_OI)

    def _held_out_power(self, w_OI: Tensor) -> Tensor:
        x_NI = self.held_out_NI
        return (x_NI @ w_OI.to(x_NI.dtype).T).float().square().sum(0)

    def take(self, solution: SparseSolution, stage: str) -> None:
        """Take the mask and weights of a solver, and note its fallbacks."""
        self.mask_OI, self.w_OI = solution.mask_OI, solution.w_OI
        self.notes += [f"{', '.join(self.names)}: {stage} {note}" for note in solution.notes]

    def accept_better(self, w_OI: Tensor, stage: str) -> None:
        """Take new weights of those linears whose held-out error does not rise."""
        before = self.held_out_errors(self.w_OI)
        after = self.held_out_errors(w_OI)
        for name, rows, old, new in zip(self.names, self.row_slices(), before, after, strict=True):
            if new <= old:
                self.w_OI[rows] = w_OI[rows]
            else:
                self.rejected[stage] += 1
                self.notes.append(
                    f"{name}: {stage} rejected, held-out error would rise from {old:.4g} "
                    f"to {new:.4g}"
                )


@dataclass
class Quantization:
    """The grid that a later stage puts kept weights on, and what is known of it by linear name.

    Attributes:
        grid: what it looks like.
        rounds_to_nearest: that stage takes the nearest value, without error feedback.
        clippings: learned ranges of the grid.
        solutions: weights as levels of the grid, once they are.
    """

    grid: GridOptions
    rounds_to_nearest: bool
    clippings: dict[str, Clipping] = field(default_factory=dict)
    solutions: dict[str, QuantizedSolution] = field(default_factory=dict)


@dataclass
class BlockTask:
    """One block as the stages so far left it, its text, and what it should return.

    Attributes:
        name: full name of the block, for messages.
        block: the module itself, fp32.
        stored: dtype that weights are saved in.
        stream: hidden states that enter the block in the model pruned so far.
        target_SLD: what the block should return, for as many sequences as are read.
        generator: for every random choice.
        pattern: what masks must look like.
        zeros: exact number of zeros of each linear.
        masks: by name, True = kept; empty until a stage has chosen them.
        dense: original weights (out, in), fp32, by name; stages must not write into them.
        mean_squares: mean squared inputs of the dense linears by column, by name, if asked for.
        quantization: what is known of a stage that quantises, if there is one.
        notes: sentences for the report.
        rejected: how often a stage's update of the block was, by its name.
        error: of outputs against targets, (batch, length).
        chosen: names of the linears that stages may change; all of them if None.
        linears: these linears.
    """

    name: str
    block: nn.Module
    stored: torch.dtype
    stream: BlockInputs
    target_SLD: Tensor
    generator: torch.Generator
    pattern: Pattern = field(default_factory=lambda: Unstructured(0.0))
    zeros: Mapping[str, int] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    mean_squares: Mapping[str, Tensor] = field(default_factory=dict)
    quantization: Quantization | None = None
    notes: list[str] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    error: Callable[[Tensor, Tensor], Tensor] = state_error
    chosen: Collection[str] | None = None
    linears: tuple[Linear, ...] = field(init=False)

    def __post_init__(self) -> None:
        found, chosen = find_linears(self.block), self.chosen
        self.linears = tuple(each for each in found if chosen is None or each.name in chosen)
        self._left = {each.module for each in found} - {each.module for each in self.linears}

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return self.stream.device

    @property
    def length(self) -> int:
        """Tokens in a calibration window."""
        return self.stream.x_SLD.shape[1]

    @property
    def weights(self) -> list[nn.Parameter]:
        """Weights of the linears, as they are stored."""
        return [linear.module.get_parameter("weight") for linear in self.linears]

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Norm gains and biases, but those of linears that are left as they are."""
        left = {id(parameter) for module in self._left for parameter in module.parameters()}
        return [
            parameter
            for parameter in self.block.parameters()
            if parameter.ndim == 1 and id(parameter) not in left
        ]

    def fitted_batches(self, size: int, most: int | None = None) -> list[Tensor]:
        """Indices of the fitted sequences, shuffled, in batches of one size.

        Args:
            size: sequences in a batch.
            most: sequences in all, if not every one is wanted.
        """
        order = torch.randperm(self.stream.fitted, generator=self.generator)[:most]
        return [batch for batch in order.split(size) if len(batch) == min(size, len(order))]

    def training_batches(self, size: int, epochs: int) -> list[Tensor]:
        """``fitted_batches`` of several passes over the sequences, shuffled anew in each."""
        return [batch for _ in range(epochs) for batch in self.fitted_batches(size)]

    def output(self, batch: Tensor | slice, with_graph: bool = False) -> Tensor:
        """The block's output (batch, length, hidden), fp32.

        With a graph, gradients reach the linears' outputs even where no weight wants one.
        """
        x_BLD = self.stream.x_SLD[batch].to(self.device)
        return self.stream.call(self.block, x_BLD.requires_grad_(with_graph))

    def target(self, batch: Tensor | slice) -> Tensor:
        """What the block should return for these sequences."""
        return self.target_SLD[batch].to(self.device)

    def output_error(self, batch: Tensor | slice) -> Tensor:
        """Error of every token's output (batch, length), in the measure of this run."""
        return self.error(self.output(batch), self.target(batch))

    def loss(self, batch: Tensor) -> Tensor:
        """Mean error over the tokens of a batch, with its graph."""
        return self.output_error(batch).mean()

    def held_out_error(self) -> float:
        """Mean error over some held-out tokens, the same in every call.

        They are as many as it takes to tell two versions of a block apart.
        """
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.stream.judged:
                error_BL = self.output_error(batch)
                total += float(error_BL.sum(dtype=torch.float64))
                tokens += error_BL.numel()
        return total / max(tokens, 1)

    def round_weights(self) -> None:
        """Round the linears to the stored dtype: whatever follows sees the file's weights."""
        for linear in self.linears:
            linear.weight_OI.copy_(linear.weight_OI.to(self.stored))

    def accept_better(
        self,
        stage: str,
        parameters: Sequence[Tensor],
        change: Callable[[], None],
        before: float | None = None,
    ) -> bool:
        """Change parameters and round them; undo it if the held-out error rises.

        Args:
            stage: its name, for messages.
            parameters: all that may change.
            change: does it.
            before: the held-out error as it is, if known.

        Returns:
            Whether the change stays.

        Raises:
            SecateurError: the new weights are not finite.
        """
        saved = [parameter.data.clone() for parameter in parameters]
        if before is None:
            before = self.held_out_error()
        change()
        for parameter in parameters:
            parameter.data.copy_(parameter.data.to(self.stored))
        if not all(bool(torch.isfinite(each).all()) for each in parameters):
            raise SecateurError(
                f"The weights of {self.name} are not finite after {stage}; lower its learning rate."
            )
        after = self.held_out_error()
        if after <= before:
            return True
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.data.copy_(value)
        self.rejected[stage] += 1
        self.notes.append(
            f"{stage} rejected, held-out error would rise from {before:.4g} to {after:.4g}"
        )
        return False
