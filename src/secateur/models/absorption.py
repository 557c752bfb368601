"""Columns of linears that can be reordered for nothing, because rows of others follow.

Between an MLP's first linears and its last one, and between values and the output of attention,
channels have no order of their own. Where that holds in a block is not read off class names: shapes
propose, and running the block with its channels in random order decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.models.structure import Linear

# Relative change of an output that reordered sums may cause; a wrong order changes all of it.
_ROUNDING = 1e-4
# The block's own name among those of its linears.
_BLOCK = ""


@dataclass(frozen=True)
class Writer:
    """A linear that computes inputs of another, and its rows that go where the columns go.

    Attributes:
        linear: the linear.
        rows_BSC: its rows, as the columns of the `Absorption`; the slices may be others.
    """

    linear: Linear
    rows_BSC: Tensor


@dataclass(frozen=True)
class Absorption:
    """Columns of a linear that may change places while the block goes on as before.

    Attributes:
        reader: the linear whose columns move.
        columns_BSC: its columns. Each b has an order of its own, in which the channels c of all
            its slices s move alike: one b for an MLP; for attention one b per key-value head, one
            slice per query head.
        writers: linears whose rows, and biases, move along.
    """

    reader: Linear
    columns_BSC: Tensor
    writers: tuple[Writer, ...]

    def split(self, score_OI: Tensor) -> Tensor:
        """Arrange scores of the reader's weights by order to be found; (B, rows, C)."""
        score_BSCO = score_OI.T[self.columns_BSC]
        return score_BSCO.permute(0, 1, 3, 2).flatten(1, 2)

    def column_order(self, order_BC: Tensor) -> Tensor:
        """The same order for all columns of the reader; position i takes column order_I[i]."""
        return _whole(self.columns_BSC, order_BC, self.reader.weight_OI.shape[1])

    def reorder(self, order_BC: Tensor) -> None:
        """Put the reader's columns into an order, position c taking channel order_BC[b, c]."""
        w_OI = self.reader.weight_OI
        w_OI.copy_(w_OI[:, self.column_order(order_BC)])
        for writer in self.writers:
            order_O = _whole(writer.rows_BSC, order_BC, len(writer.linear.weight_OI))
            for parameter in (writer.linear.weight_OI, writer.linear.bias_O):
                if parameter is not None:
                    parameter.copy_(parameter[order_O])


def _whole(places_BSC: Tensor, order_BC: Tensor, size: int) -> Tensor:
    """Extend an order of channels to all rows or columns of a linear."""
    whole = torch.arange(size, device=places_BSC.device)
    moved_BSC = places_BSC.gather(2, order_BC[:, None].expand(places_BSC.shape))
    whole[places_BSC.flatten()] = moved_BSC.flatten()
    return whole


def find_absorptions(
    block: nn.Module, groups: Iterable[Sequence[Linear]], run: Callable[[], Tensor]
) -> list[Absorption]:
    """Return what can be reordered in a block, at most one absorption per linear.

    Each was proved: with its channels in a random order, neither the reader's output nor the
    block's changes by more than rounding. A linear that does not run proves nothing and is left.

    Args:
        block: with dense weights in fp32; as before when this returns.
        groups: its linears by shared input, in the order of execution.
        run: runs the block in fp32, on the same input each time, and returns its output.
    """
    waiting = list(_proposals(block, groups))
    if not waiting:
        return []
    proof = _Proof([proposals[0].reader for proposals in waiting], run)
    proved: list[Absorption] = []
    # Sibling experts do not see each other, so that one pass serves the same linear of them all.
    kinds: dict[str, list[list[Absorption]]] = {}
    for proposals in waiting:
        kinds.setdefault(proposals[0].reader.kind, []).append(proposals)
    for siblings in kinds.values():
        for attempt in itertools.zip_longest(*siblings):
            done = {absorption.reader.name for absorption in proved}
            tried = [each for each in attempt if each and each.reader.name not in done]
            if tried:
                proved += proof.unchanged_by(tried)
    return proved


def _proposals(block: nn.Module, groups: Iterable[Sequence[Linear]]) -> Iterator[list[Absorption]]:
    """What shapes allow for every linear that others of the same module precede."""
    inside: dict[str, list[list[Linear]]] = {}
    for group in groups:
        together: dict[str, list[Linear]] = {}
        for linear in group:
            together.setdefault(linear.name.rpartition(".")[0], []).append(linear)
        for module, linears in together.items():
            inside.setdefault(module, []).append(linears)
    for module, runs in inside.items():
        head_width = _head_width(block.get_submodule(module))
        for writers, readers in itertools.pairwise(runs):
            if len(readers) > 1:
                continue
            if head_width is None:
                proposals = list(_channels(readers[0], writers))
            else:
                # Of query, key and value, the last to run is nearly always the value.
                proposals = list(_values(readers[0], writers[::-1], head_width))
            if proposals:
                yield proposals


def _head_width(module: nn.Module) -> int | None:
    widths = [getattr(module, name, None) for name in ("head_dim", "head_size")]
    return next((width for width in widths if isinstance(width, int) and width > 0), None)


def _channels(reader: Linear, writers: Sequence[Linear]) -> Iterator[Absorption]:
    """The hidden channels of an MLP: gate and up apart, or one on top of the other."""
    columns_BSC = _places(reader, 1).view(1, 1, -1)
    width = columns_BSC.numel()
    apart = [writer for writer in writers if len(writer.weight_OI) == width]
    if apart:
        rows = tuple(Writer(writer, columns_BSC) for writer in apart)
        yield Absorption(reader, columns_BSC, rows)
    for writer in writers:
        if len(writer.weight_OI) == 2 * width:
            yield Absorption(
                reader, columns_BSC, (Writer(writer, _places(writer, 0).view(1, 2, -1)),)
            )


def _values(reader: Linear, writers: Sequence[Linear], head_width: int) -> Iterator[Absorption]:
    """Channels within the heads of attention, whose values several queries may share."""
    columns_I = _places(reader, 1)
    width = len(columns_I)
    for writer in writers:
        rows_O = _places(writer, 0)
        fused = len(rows_O) > width
        shared = (len(rows_O) - width) // 2 if fused else len(rows_O)
        if width % head_width or shared % head_width or shared == 0 or width % shared:
            continue
        columns_BSC = columns_I.view(shared // head_width, -1, head_width)
        # By themselves, or below all queries and keys.
        layouts = [rows_O[-shared:].view(-1, 1, head_width)]
        if fused and len(rows_O) == width + 2 * shared:
            # Below the queries and the key of their own group.
            layouts.append(rows_O.view(len(columns_BSC), -1, head_width)[:, -1:])
        for rows_BSC in layouts:
            yield Absorption(reader, columns_BSC, (Writer(writer, rows_BSC),))


def _places(linear: Linear, dim: int) -> Tensor:
    w_OI = linear.weight_OI
    return torch.arange(w_OI.shape[dim], device=w_OI.device)


class _Proof:
    """Holds a block against itself in another order."""

    def __init__(self, readers: Iterable[Linear], run: Callable[[], Tensor]) -> None:
        self._modules = {reader.name: reader.module for reader in readers}
        self._run = run
        self._generator = torch.Generator().manual_seed(0)
        self._expected = self._outputs()

    def unchanged_by(self, tried: Sequence[Absorption]) -> list[Absorption]:
        """Return those of the absorptions that change nothing, all of them tried at a time."""
        orders = [self._random_order(absorption.columns_BSC) for absorption in tried]
        for absorption, order_BC in zip(tried, orders, strict=True):
            absorption.reorder(order_BC)
        found = self._outputs()
        for absorption, order_BC in zip(tried, orders, strict=True):
            absorption.reorder(order_BC.argsort(1))
        same = {
            name
            for name, y_BLD in found.items()
            if name in self._expected and _close(y_BLD, self._expected[name])
        }
        if _BLOCK not in same:
            return []
        return [absorption for absorption in tried if absorption.reader.name in same]

    def _random_order(self, columns_BSC: Tensor) -> Tensor:
        orders, _, channels = columns_BSC.shape
        draws_BC = torch.rand(orders, channels, generator=self._generator)
        return draws_BC.argsort(1).to(columns_BSC.device)

    def _outputs(self) -> dict[str, Tensor]:
        """What the readers that ran, and the block, return."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            def hook(_module: nn.Module, _inputs: object, y_BLD: Tensor) -> None:
                outputs[name] = y_BLD.clone()

            return hook

        handles = [
            module.register_forward_hook(keep(name)) for name, module in self._modules.items()
        ]
        try:
            outputs[_BLOCK] = self._run()
        finally:
            for handle in handles:
                handle.remove()
        return outputs


def _close(y_BLD: Tensor, expected_BLD: Tensor) -> bool:
    """Whether no token differs by more than rounding."""
    if y_BLD.shape != expected_BLD.shape:
        return False
    change_BL = torch.linalg.vector_norm(y_BLD - expected_BLD, dim=-1)
    size_BL = torch.linalg.vector_norm(expected_BLD, dim=-1)
    # Each token counts by its own size: a few have huge hidden states that would hide the rest.
    return bool((change_BL <= _ROUNDING * size_BL).all())
