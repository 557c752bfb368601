"""Find the blocks that text passes through, by sending text through the model.

What a module computes does not matter for that, only what is handed to whom. So weights stand in
that take no memory, products with matrices are left out, and a model of any size is run within a
second, on the meta device too. The walk over the blocks is tried on the same text: a model whose
blocks it does not give the hidden states of the model's own forward pass is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.models.capture import capture, same_calls
from secateur.models.experts import unstacked_experts
from secateur.models.forwards import hidden_states, replaced_forwards
from secateur.models.structure import BlockList, TransposedLinear, find_linears
from secateur.runs.errors import SecateurError

_SEQUENCES, _LENGTH = 2, 6
# What torch says of a write into a stand-in, which is many times the same number.
_WRITES_WEIGHTS = "more than one element of the written-to tensor"
_PRODUCTS = (nn.Linear.forward, Conv1D.forward, TransposedLinear.forward)


def find_blocks(model: PreTrainedModel) -> BlockList:
    """Return the stack of blocks that text passes through.

    Args:
        model: with or without weights; it is as before when this returns.

    Raises:
        SecateurError: there is no such stack, there are several, or the blocks do more than hand
            hidden states from one to the next.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _stand_ins(model):
        with _explained(model):
            text_BL, other_BL = _texts(model)
        blocks, visits = _find_stack(model, text_BL)
        _require_own_weights(blocks)
        _require_chain(blocks, visits)
        with _explained(model):
            captured = capture(blocks, text_BL)
            other = capture(blocks, other_BL)
        if not same_calls(captured.calls, other.calls):
            raise SecateurError(
                f"{type(model).__name__} gives its blocks inputs that depend on the text beside "
                "the hidden states; this family is not supported."
            )
        x_BLD = captured.first_BLD
        for index, (block, call) in enumerate(zip(blocks, captured.calls, strict=True)):
            with _explained(model):
                x_BLD = call(block, x_BLD)
            if not _same(x_BLD, visits[index].y_BLD):
                raise SecateurError(
                    f"{blocks.name(index)} of {type(model).__name__} is handed more than hidden "
                    "states by the blocks before it; this family is not supported."
                )
    return blocks


@dataclass(frozen=True)
class _Visit:
    """One call of a module of a list."""

    index: int
    x_BLD: Any
    output: Any

    @property
    def y_BLD(self) -> Tensor:
        return hidden_states(self.output)

    @property
    def beside(self) -> int | None:
        return None if isinstance(self.output, Tensor) else len(self.output) - 1


def _find_stack(model: PreTrainedModel, text_BL: Tensor) -> tuple[BlockList, list[_Visit]]:
    """Run text through a model; return the list whose modules it visits, and the visits.

    A list inside a module of another list, such as experts, is part of that.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    visits: dict[str, list[_Visit]] = {}

    def recording(name: str, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            x_BLD = args[0] if args else kwargs.get("hidden_states")
            visits.setdefault(name, []).append(_Visit(index, x_BLD, output))
            return output

        return record

    outer = {
        name: modules
        for name, modules in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
        # Linears that are listed themselves are projections beside the blocks.
        and any(linear.name for module in modules for linear in find_linears(module))
    }
    wrapped = [
        (module, recording(name, index, module.forward))
        for name, modules in outer.items()
        for index, module in enumerate(modules)
    ]
    with replaced_forwards(wrapped), _explained(model):
        model.base_model(input_ids=text_BL, use_cache=False)
    if not visits:
        raise SecateurError(
            f"{type(model).__name__} has no list of decoder blocks with linears; "
            "use a causal language model built from a stack of blocks."
        )
    if len(visits) > 1:
        stacks = " and ".join(f"{name} ({len(outer[name])} modules)" for name in visits)
        raise SecateurError(
            f"Text passes through more than one stack of {type(model).__name__}, {stacks}; models "
            "with a single stack of blocks can be pruned."
        )
    ((name, ran),) = visits.items()
    positions = tuple(visit.index for visit in ran)
    if list(positions) != sorted(set(positions)):
        raise SecateurError(
            f"Text does not pass through the modules of {name} in {type(model).__name__} once and "
            "in order; this family is not supported."
        )
    modules = nn.ModuleList(outer[name][position] for position in positions)
    beside = tuple(visit.beside for visit in ran)
    return BlockList(model, name, modules, positions, beside), ran


def _require_own_weights(blocks: BlockList) -> None:
    """Raise SecateurError if two linears of the blocks are one."""
    # Ties are lost on the meta device, and known by name.
    tied = getattr(blocks.model, "all_tied_weights_keys", None) or {}
    owners: dict[str | int, str] = {}
    for index, block in enumerate(blocks):
        for linear in find_linears(block):
            name = f"{blocks.name(index)}.{linear.name}"
            weight = f"{name}.weight"
            for key in (id(linear.module), tied.get(weight, weight)):
                first = owners.setdefault(key, name)
                if first != name:
                    raise SecateurError(
                        f"{name} and {first} are one and the same linear; models whose blocks "
                        "share weights cannot be pruned block by block."
                    )


def _require_chain(blocks: BlockList, visits: list[_Visit]) -> None:
    """Raise SecateurError unless each block ran on what the one before it returned."""
    name = type(blocks.model).__name__
    for index, (before, visit) in enumerate(zip([None, *visits], visits, strict=False)):
        x_BLD = visit.x_BLD
        if not isinstance(x_BLD, Tensor) or not isinstance(visit.y_BLD, Tensor):
            raise SecateurError(
                f"{blocks.name(index)} of {name} is not called with hidden states first; "
                "this family is not supported."
            )
        if x_BLD.shape[:2] != (_SEQUENCES, _LENGTH) or x_BLD.ndim != 3:
            raise SecateurError(
                f"{blocks.name(index)} of {name} works on hidden states of shape "
                f"{list(x_BLD.shape)}, not (sequences, length, width); this family is not "
                "supported."
            )
        if visit.y_BLD.shape != x_BLD.shape:
            raise SecateurError(
                f"{blocks.name(index)} of {name} does not return hidden states of the shape "
                "it gets; this family is not supported."
            )
        if before is not None and not _same(before.y_BLD, x_BLD):
            raise SecateurError(
                f"{name} changes the hidden states between {blocks.name(index - 1)} and "
                f"{blocks.name(index)}; this family is not supported."
            )


def _same(x_BLD: Tensor, other_BLD: Tensor) -> bool:
    return torch.allclose(x_BLD, other_BLD, rtol=1e-3, equal_nan=True)


@contextmanager
def _explained(model: PreTrainedModel) -> Iterator[None]:
    """Name the model where its own code, which may raise anything, does not take text alone."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if _WRITES_WEIGHTS in reason:
            reason = "its code changes weights while it runs"
        raise SecateurError(
            f"Text alone does not pass through {type(model).__name__} ({reason}); this family is "
            "not supported."
        ) from error


def _texts(model: PreTrainedModel) -> Tensor:
    """Two texts (2, sequences, length) of tokens that mean nothing to the model's own code."""
    config = model.config.get_text_config()
    special = {
        value
        for each in (model.config, config)
        for name, value in vars(each).items()
        if isinstance(value, int) and name.endswith(("_id", "_index"))
    }
    device: torch.device = model.device
    wanted = 2 * _SEQUENCES * _LENGTH
    free = [token for token in range(wanted + len(special)) if token not in special]
    tokens = torch.tensor(free[:wanted]) % config.vocab_size
    texts: Tensor = tokens.view(2, _SEQUENCES, _LENGTH).to(device)
    return texts


@contextmanager
def _stand_ins(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a model runs in eval mode on weights that take no memory."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(unstacked_experts(model))
        products = [
            (module, _product(module))
            for module in model.modules()
            if type(module).forward in _PRODUCTS
        ]
        stack.enter_context(replaced_forwards(products))
        stack.enter_context(_small_parameters(model))
        if any(hasattr(module, "has_gate") for module in model.modules()):
            # Experts that are no linears: kernels for all of them at once take no stand-ins.
            stack.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation("eager")
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def _small_parameters(model: PreTrainedModel) -> Iterator[None]:
    kept = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    ]
    # One stand-in for each parameter: what is shared stays shared.
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in kept:
        if id(parameter) not in made:
            made[id(parameter)] = _stand_in(parameter, isinstance(module, nn.Embedding))
        module._parameters[name] = made[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def _stand_in(parameter: nn.Parameter, varied: bool) -> nn.Parameter:
    """A parameter of the same shape that repeats one number, or a few if it is to vary."""
    device = torch.device("cpu") if parameter.is_meta else parameter.device
    # The CPU lacks some operations in half precision, some kernels of other devices know no other.
    dtype = torch.float32 if device.type == "cpu" else parameter.dtype
    if varied:
        numbers = torch.arange(sum(parameter.shape), device=device).sin().to(dtype)
        value = numbers.as_strided(parameter.shape, (1,) * parameter.ndim)
    else:
        value = torch.full((), 0.1, dtype=dtype, device=device).expand(parameter.shape)
    return nn.Parameter(value, requires_grad=False)


def _product(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A product with a matrix of rank one, which is a product of two vectors."""
    rows, columns = module.get_parameter("weight").shape
    if type(module).forward is not nn.Linear.forward:
        rows, columns = columns, rows

    def product(x: Tensor) -> Tensor:
        a_I = torch.arange(columns, device=x.device, dtype=torch.float32).sin()
        b_O = torch.arange(rows, device=x.device, dtype=torch.float32).cos()
        mean = (x.float() * a_I).sum(-1, keepdim=True) / max(columns, 1)
        return (mean * b_O).to(x.dtype)

    return product
