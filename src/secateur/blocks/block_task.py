"""What a block method works on: a whole block, its text, and what it should return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.blocks.streams import Stream
from secateur.models.structure import Linear
from secateur.patterns.pattern import Pattern
from secateur.runs.errors import SecateurError
from secateur.solvers.block_loss import state_error
from secateur.solvers.grids import Clipping, GridOptions, QuantisedSolution

Reference = Literal["pruned", "dense"]


@dataclass
class BlockTask:
    """One block as the stages so far left it.

    Attributes:
        name: full name of the block, for messages.
        block: the module itself, fp32.
        linears: its prunable linears.
        dense: their original weights (out, in), fp32, by name; methods must not write into them.
        masks: by name, True = kept; empty until a stage has chosen them.
        zeros: exact number of zeros of each linear.
        pattern: what masks must look like.
        stored: dtype that weights are saved in.
        mean_squares: mean squared inputs of the dense linears by column, by name, if asked for.
        stream: hidden states that enter the block in the model pruned so far.
        targets: by reference, what the block should return (sequences, length, hidden).
        generator: for every random choice.
        grid: on which a later stage will put kept weights, if one will.
        rounds_to_nearest: that stage takes the nearest value of the grid.
        clippings: learned ranges of its grid, by linear name.
        quantised: weights as levels of a grid, by linear name, once they are.
        notes: sentences for the report.
        error: of outputs against targets, (batch, length).
    """

    name: str
    block: nn.Module
    linears: tuple[Linear, ...]
    dense: Mapping[str, Tensor]
    masks: dict[str, Tensor]
    zeros: Mapping[str, int]
    pattern: Pattern
    stored: torch.dtype
    mean_squares: Mapping[str, Tensor]
    stream: Stream
    targets: Mapping[Reference, Tensor]
    generator: torch.Generator
    grid: GridOptions | None = None
    rounds_to_nearest: bool = False
    clippings: dict[str, Clipping] = field(default_factory=dict)
    quantised: dict[str, QuantisedSolution] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: Callable[[Tensor, Tensor], Tensor] = state_error

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return self.stream.device

    @property
    def length(self) -> int:
        """Tokens in a calibration window."""
        return self.stream.x_SLD.shape[1]

    def fitted_batches(self, size: int, most: int | None = None) -> list[Tensor]:
        """Indices of the sequences that may be fitted on, shuffled, in batches of one size.

        Args:
            size: sequences in a batch.
            most: sequences in all, if not every one is wanted.
        """
        order = torch.randperm(self.stream.batches.boundary, generator=self.generator)[:most]
        return [batch for batch in order.split(size) if len(batch) == min(size, len(order))]

    def training_batches(self, size: int, epochs: int) -> list[Tensor]:
        """``fitted_batches`` for so many passes over the sequences, shuffled anew in each."""
        return [batch for _ in range(epochs) for batch in self.fitted_batches(size)]

    def output(self, batch: Tensor | slice, with_graph: bool = False) -> Tensor:
        """The block's output (batch, length, hidden), fp32.

        Args:
            batch: sequences.
            with_graph: record what gradients at the linears' outputs need, even where no weight
                wants one.
        """
        x_BLD = self.stream.x_SLD[batch].to(self.device)
        return self.stream.call(self.block, x_BLD.requires_grad_(with_graph))

    def target(self, batch: Tensor | slice, reference: Reference) -> Tensor:
        """What the block should return for these sequences."""
        return self.targets[reference][batch].to(self.device)

    def output_error(self, batch: Tensor | slice, reference: Reference) -> Tensor:
        """Error of every token's output (batch, length), in the measure of this run."""
        return self.error(self.output(batch), self.target(batch, reference))

    def held_out_error(self, reference: Reference) -> float:
        """Error of the output, token by token, mean over some held-out tokens.

        The same ones in every call, as many as tell two versions of a block apart.
        """
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.stream.batches.judged:
                error_BL = self.output_error(batch, reference)
                total += float(error_BL.sum(dtype=torch.float64))
                tokens += error_BL.numel()
        return total / max(tokens, 1)

    def round_weights(self) -> None:
        """Round the linears to what will be saved, so that what follows sees the file's weights."""
        for linear in self.linears:
            linear.weight_OI.copy_(linear.weight_OI.to(self.stored))

    def accept_better(
        self,
        stage: str,
        reference: Reference,
        parameters: Sequence[Tensor],
        change: Callable[[], None],
        before: float | None = None,
    ) -> bool:
        """Change parameters, round them to the stored dtype, undo it if the held-out error rises.

        Args:
            stage: its name, for messages.
            reference: what the error is measured against.
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
            before = self.held_out_error(reference)
        change()
        for parameter in parameters:
            parameter.data.copy_(parameter.data.to(self.stored))
        if not all(bool(torch.isfinite(each).all()) for each in parameters):
            raise SecateurError(
                f"The weights of {self.name} are not finite after {stage}; lower its learning rate."
            )
        after = self.held_out_error(reference)
        better = after <= before
        if not better:
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.data.copy_(value)
            self.notes.append(
                f"{stage} rejected, held-out error would rise from {before:.4g} to {after:.4g}"
            )
        return better
