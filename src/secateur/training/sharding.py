"""A model of which each process holds some output rows of every matrix, by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from secateur.blocks.precision import forward_precision
from secateur.models.forwards import replaced_forwards
from secateur.models.streamed import StreamedStore
from secateur.training.holding import Holding
from secateur.training.low_rank import MaskedLoRA
from secateur.training.masked_linear import MaskedLinear
from secateur.training.masks import as_factor
from secateur.training.options import Training
from secateur.training.ranks import Ranks

Result = TypeVar("Result")


class _Root(nn.Module):
    """The model with a forward pass that is whatever is to be run of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()


class Sharded(Holding):
    """This process's part of a model; all processes make the same calls in the same order.

    Weights, gradients, moments and masks are divided alike. When a block is about to run, its
    masked weights are gathered in the dtype of products; removed weights never travel, and the
    gradient of the gathered weight is the straight-through gradient of all weights.
    """

    def __init__(
        self,
        store: StreamedStore,
        masked: Callable[[int], Sequence[MaskedLinear]],
        *,
        weights: torch.dtype,
        products: torch.dtype,
        device: torch.device,
        ranks: Ranks,
        reduce_every_pass: bool = False,
    ) -> None:
        """Load a model block by block and keep this process's part of each.

        Args:
            store: of a model without weights.
            masked: gives the masked linears of a block, which then has its weights.
            weights: dtype of parameters.
            products: dtype of matrix products; masked weights are gathered in it.
            device: of this process.
            ranks: the processes.
            reduce_every_pass: add up gradients after every forward pass, not once a step.
        """
        super().__init__(store.blocks)
        self._device = device
        self._products = products
        self._ranks = ranks
        self._every_pass = reduce_every_pass
        self._dense = False
        self._product_rows: dict[str, int] = {}
        self._trained: dict[str, nn.Parameter] = {}
        self._local: dict[str, nn.Parameter] = {}
        self._mesh = init_device_mesh(device.type, (ranks.world,))
        for index in range(len(self.blocks)):
            block = store.load(index)
            whole = masked(index)
            for each in whole:
                if each.low_rank is not None:
                    each.linear.module.add_module("low_rank", each.low_rank)
            self._shard(
                block, weights, {id(each.weight) for each in whole if each.linear.transposed}
            )
            self.linears = [*self.linears, *map(self._part, whole)]
        store.load_outside()
        self._root = _Root(self.blocks.model)
        self._fsdp = self._shard(self._root, weights, set())
        # The first call of the root makes it one.
        self._root(lambda: None)
        self._fsdp.reshard()

    def train(self, options: Training) -> dict[str, nn.Parameter]:
        self._trained = super().train(options)
        for each in self.linears:
            if each.lora is not None:
                weight = each.linear.module.get_parameter("weight")
                # Gradients of the product are those of the weight, which FSDP adds up.
                weight.requires_grad_(True)
                self.replicated.add(f"{each.name}.lora.a_RI")
                rows = weight.shape[int(each.linear.transposed)]
                self._product_rows[f"{each.name}.lora.b_OR"] = rows
        masked = {f"{each.name}.weight": each.weight for each in self.linears}
        self._local = {
            name: masked[name] if name in masked else _local_parameter(parameter)
            for name, parameter in self._trained.items()
        }
        if self._products != torch.float32:
            self._sum_gradients_in_fp32()
        return self._local

    @contextmanager
    def masked(self, *, dense: bool = False) -> Iterator[None]:
        self._dense = dense
        # A conversion that autocast keeps from an earlier pass would hand its gradient on only
        # after those of its block have been summed.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        # Gathered weights are masked already.
        boosted = [each for each in self.linears if each.low_rank is not None]
        try:
            with replaced_forwards((each.linear.module, _boosted(each)) for each in boosted):
                yield
        finally:
            self._dense = False
            torch.set_autocast_cache_enabled(cached)

    def forward(self, run: Callable[[], Result], *, last: bool = True) -> Result:
        self._fsdp.set_requires_gradient_sync(last or self._every_pass)
        result: Result = self._root(run)
        return result

    @torch.no_grad()
    def evaluate(self, run: Callable[[], Result]) -> Result:
        with forward_precision(self._products, self._device):
            result: Result = self._root(run)
        # What stays gathered here would not follow the next change of the weights.
        self._fsdp.reshard()
        return result

    @torch.no_grad()
    def collect_gradients(self) -> None:
        for name, parameter in self._trained.items():
            gradient = parameter.grad
            parameter.grad = None
            self._local[name].grad = None if gradient is None else _local(gradient)
        for each in self.linears:
            if each.lora is not None:
                self._collect_product(each, each.lora)
            elif each.frozen and each.weight.grad is not None:
                each.weight.grad.mul_(as_factor(each.mask, each.weight.dtype))

    def _collect_product(self, each: MaskedLinear, lora: MaskedLoRA) -> None:
        weight = each.linear.module.get_parameter("weight")
        assert weight.grad is not None, "every linear takes part"
        gradient = _local(weight.grad) * as_factor(each.mask, each.weight.dtype)
        weight.grad = None
        lora.take_gradient(each.in_rows(gradient))
        assert lora.a_RI.grad is not None
        self._ranks.sum([lora.a_RI.grad])

    def global_tensor(self, parameter: str, local: Tensor) -> Tensor:
        if parameter in self.replicated:
            return local
        if parameter in self._product_rows:
            rank = local.shape[1]
            shape = torch.Size((self._product_rows[parameter], rank))
            return DTensor.from_local(
                local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(rank, 1)
            )
        whole = self._trained.get(parameter)
        if whole is None:
            whole = self.model.get_parameter(parameter)
        assert isinstance(whole, DTensor)
        return DTensor.from_local(
            local,
            self._mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def _shard(self, module: nn.Module, weights: torch.dtype, transposed: set[int]) -> FSDPModule:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(weights)
        sharded = fully_shard(
            module,
            mesh=self._mesh,
            # Rows of outputs, however they are stored: groups lie along the inputs.
            shard_placement_fn=lambda p: Shard(1 if id(p) in transposed else 0),
            # Autocast chooses the dtype of every operation, as in one process.
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        )
        # Each process's loss is a part of the step's, so gradients are added, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        return sharded

    def _part(self, whole: MaskedLinear) -> MaskedLinear:
        parameter = whole.linear.module.get_parameter("weight")
        rows = self._ranks.rows(len(whole.mask_OI))
        part = whole.part(_local_parameter(parameter), rows)
        self._gather_masked(_local(parameter), part)
        return part

    def _gather_masked(self, local: Tensor, held: MaskedLinear) -> None:
        """Have FSDP gather masked weights, by its extension for tensor subclasses.

        ``local`` is this process's part of a parameter, ``held`` the same with its mask.
        """
        dim = int(held.linear.transposed)

        @torch.no_grad()
        def before(
            mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: Any
        ) -> tuple[tuple[Tensor], None]:
            part = held.whole().to(self._products)
            if not self._dense:
                part = part * as_factor(held.mask, part.dtype)
            missing = -(-size[dim] // mesh.size()) - part.shape[dim]
            if missing:
                # Parts must have one size; only rows are ever divided unevenly.
                part = torch.cat([part, part.new_zeros(missing, size[1])])
            return (part,), None

        def after(
            gathered: tuple[Tensor],
            metadata: None,
            dtype: torch.dtype,
            *,
            out: Tensor | None = None,
        ) -> tuple[Tensor, tuple[Tensor]] | None:
            # Once the parameter exists it shares the gathered tensor's memory.
            return None if out is not None else (gathered[0], (gathered[0],))

        vars(local).update(fsdp_pre_all_gather=before, fsdp_post_all_gather=after)

    def _sum_gradients_in_fp32(self) -> None:
        """Let gradients of weights that are gathered in another dtype add up in fp32."""
        for index, block in enumerate(self.blocks):
            assert isinstance(block, FSDPModule)
            block.unshard()
            prefix = f"{self.blocks.name(index)}."
            for each in self.linears:
                if each.name.startswith(prefix):
                    each.linear.module.get_parameter("weight").grad_dtype = torch.float32
            block.reshard()


def _local(tensor: Tensor) -> Tensor:
    """The part of this process: the tensor that FSDP asks for extensions, where a view is none."""
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor


def _local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(_local(parameter), requires_grad=parameter.requires_grad)


def _boosted(each: MaskedLinear) -> Callable[[Tensor], Tensor]:
    module, boost = each.linear.module, each.low_rank
    assert boost is not None
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = plain(x) + boost(x)
        return y

    return forward
