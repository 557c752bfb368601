"""Which linears receive the same tensor, and statistics of those tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.blocks.precision import products_of_bfloat16
from secateur.blocks.tasks import InputStatistics, Needs
from secateur.models.forwards import Reached
from secateur.models.structure import Linear

# Enough held-out tokens to tell a good update of a linear from a bad one, in a small part of a
# solver's time.
_JUDGED_TOKENS = 1024


@dataclass(frozen=True)
class LinearGroup:
    """Linears that receive one and the same tensor."""

    linears: tuple[Linear, ...]


class InputAccumulator:
    """Sums input statistics over batches."""

    def __init__(self, width: int, needs: Needs, device: torch.device, dtype: torch.dtype) -> None:
        self._needs = needs
        self._rounds = dtype == torch.bfloat16
        self.tokens = 0
        self._square_I = torch.zeros(width, device=device)
        self._gram_II = torch.zeros(width, width, device=device) if needs == "gram" else None

    def add(self, x_NI: Tensor) -> None:
        """Add inputs (tokens, in)."""
        # Called from within a forward pass, whose autocast would make sums of bf16.
        with torch.autocast(x_NI.device.type, enabled=False):
            self._add(x_NI.float())

    def _add(self, x_NI: Tensor) -> None:
        self.tokens += len(x_NI)
        if self._gram_II is not None:
            with products_of_bfloat16(x_NI.device) if self._rounds else nullcontext():
                _add_upper_gram(self._gram_II, x_NI)
        elif self._needs == "norms":
            self._square_I += x_NI.square().sum(0)

    def result(self) -> InputStatistics:
        """Return means over all tokens added so far."""
        count = max(self.tokens, 1)
        if self._gram_II is None:
            return InputStatistics(self.tokens, self._square_I / count, None)
        upper_II = self._gram_II.div_(count).triu_()
        gram_II = upper_II + upper_II.triu(1).T
        return InputStatistics(self.tokens, gram_II.diagonal().clone(), gram_II)

    def gram(self) -> Tensor:
        """Return the Gram matrix, which has to have been asked for."""
        gram_II = self.result().gram_II
        assert gram_II is not None, "only norms were asked for"
        return gram_II


def _add_upper_gram(gram_II: Tensor, x_NI: Tensor) -> None:
    """Add xᵀx in strips of columns, without most of what lies below the diagonal."""
    width = x_NI.shape[1]
    strip = min(-(-width // 3), 1024)
    for start in range(0, width, strip):
        part_NS = x_NI[:, start : start + strip]
        gram_II[start : start + strip, start:].addmm_(part_NS.T, x_NI[:, start:])


def judged_tokens(x_NI: Tensor) -> Tensor:
    """Some inputs from all over the batch, to measure the errors of linears on; a view."""
    return x_NI[:: -(-len(x_NI) // _JUDGED_TOKENS)]


def find_groups(linears: Sequence[Linear], run: Callable[[], object]) -> list[LinearGroup]:
    """Group linears by the identity of their input tensor during ``run``.

    Groups come in the order of execution. A linear that did not run (an expert that no token was
    sent to) forms a group of its own at the end.
    """
    seen: list[tuple[Tensor, list[Linear]]] = []

    def record(linear: Linear, x: Tensor) -> None:
        for tensor, members in seen:
            if tensor is x:
                members.append(linear)
                return
        seen.append((x, [linear]))

    with _input_hooks(linears, record):
        run()
    ran = {linear.name for _, members in seen for linear in members}
    idle = [LinearGroup((linear,)) for linear in linears if linear.name not in ran]
    return [LinearGroup(tuple(members)) for _, members in seen] + idle


def steps(groups: Iterable[LinearGroup]) -> list[list[LinearGroup]]:
    """Put groups together that one pass can handle: the same linears of sibling experts."""
    ordered: dict[str, list[LinearGroup]] = {}
    for group in groups:
        ordered.setdefault(group.linears[0].kind, []).append(group)
    return list(ordered.values())


def visit_inputs(
    groups: Sequence[LinearGroup], run: Callable[[], object], visit: Callable[[int, Tensor], None]
) -> None:
    """Call ``visit(group index, inputs (tokens, in))`` once per group during ``run``.

    The pass ends as soon as every group was visited: the rest of the block is not needed.
    """
    waiting = set(range(len(groups)))

    def visit_once(index: int, x_NI: Tensor) -> None:
        visit(index, x_NI)
        waiting.discard(index)
        if not waiting:
            raise Reached

    with suppress(Reached), observed_inputs(groups, visit_once):
        run()


@contextmanager
def observed_inputs(
    groups: Sequence[LinearGroup], visit: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within the context, call ``visit(group index, inputs (tokens, in))`` in every pass."""
    index_of = {group.linears[0].name: index for index, group in enumerate(groups)}

    def record(linear: Linear, x: Tensor) -> None:
        visit(index_of[linear.name], x.detach().flatten(0, -2))

    with _input_hooks([group.linears[0] for group in groups], record):
        yield


@contextmanager
def _input_hooks(
    linears: Iterable[Linear], record: Callable[[Linear, Tensor], None]
) -> Iterator[None]:
    def hook_for(linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: record(linear, args[0])

    with ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.module.register_forward_pre_hook(hook_for(linear)))
        yield
