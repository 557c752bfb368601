"""The pack-quantized form of compressed-tensors: integers of a few bits in int32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur.models.formats.format import WEIGHT, FinishedLinear, Stored, WeightFormat, require
from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import GridOptions

_FORMAT = "pack-quantized"
_PACKED, _SCALE, _ZERO, _SHAPE = (
    f"{WEIGHT}_{part}" for part in ("packed", "scale", "zero_point", "shape")
)


@dataclass(frozen=True)
class Packed(WeightFormat):
    """Levels of a grid, which compressed-tensors, transformers and vLLM read."""

    grid: GridOptions

    name = "packed"
    pieces = (_PACKED, _SCALE, _ZERO, _SHAPE)
    package = ("compressed-tensors", "secateur[quantize]")
    otherwise = "use --quantized-format dequantized"

    @classmethod
    def of(cls, grid: GridOptions | None) -> Self:
        if grid is None:
            raise SecateurError(
                "The format packed holds integers and nothing makes weights integers; add the "
                "stage quantize, or use the format plain."
            )
        return cls(grid)

    @classmethod
    def recognise(cls, described: Mapping[str, Any]) -> Self | None:
        """Checkpoints that mix several widths of integers are not among those that can be read."""
        groups = [each.get("weights") or {} for each in described.get("config_groups", {}).values()]
        bits: set[Any] = {each.get("num_bits") for each in groups}
        if described.get("format") != _FORMAT or len(bits) != 1 or None in bits:
            return None
        symmetric = any(each.get("symmetric", True) for each in groups)
        return cls(GridOptions(bits.pop(), groups[0].get("group_size") or 0, symmetric))

    def describe(self, blocks: BlockList) -> dict[str, Any]:
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
        )

        grid = self.grid
        weights = QuantizationArgs(
            num_bits=grid.bits,
            symmetric=grid.symmetric,
            strategy="group" if grid.group else "channel",
            group_size=grid.group or None,
        )
        config = QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            format=_FORMAT,
            quantization_status="compressed",
            ignore=sorted(_other_linears(blocks)),
        )
        described: dict[str, Any] = config.model_dump(mode="json")
        if not grid.symmetric:
            # transformers makes room for unpacked zero points, unless it unpacks while it loads.
            described["dequantize"] = True
        return described

    def layout(self, shape: tuple[int, int], dtype: torch.dtype, kept: int) -> dict[str, Stored]:
        groups = shape[1] // self.grid.columns(shape[1])
        return self._tensors(shape, dtype, groups, self.grid.symmetric)

    def _tensors(
        self, shape: tuple[int, int], dtype: torch.dtype, groups: int, symmetric: bool
    ) -> dict[str, Stored]:
        rows, width = shape
        tensors = {
            _PACKED: Stored((rows, self._words(width)), torch.int32),
            _SCALE: Stored((rows, groups), dtype),
            _SHAPE: Stored((2,), torch.int64),
        }
        if not symmetric:
            tensors[_ZERO] = Stored((self._words(rows), groups), torch.int32)
        return tensors

    def _words(self, integers: int) -> int:
        """Number of int32 that integers fill without gaps."""
        return math.ceil(integers * self.grid.bits / 32)

    def encode(self, linear: FinishedLinear) -> dict[str, Tensor]:
        assert linear.quantised is not None, "the stage quantize leaves no linear out"
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        grid, level_OI = linear.quantised.grid, linear.quantised.level_OI
        bits = grid.options.bits
        zero_OI = grid.zero_OG.repeat_interleave(level_OI.shape[1] // grid.zero_OG.shape[1], dim=1)
        pieces = {
            _PACKED: pack_to_int32((level_OI + zero_OI).to(torch.int8), bits),
            _SCALE: grid.scale_OG.to(linear.dtype),
            _SHAPE: torch.tensor(level_OI.shape),
        }
        if not grid.options.symmetric:
            pieces[_ZERO] = pack_to_int32(grid.zero_OG.to(torch.int8), bits, packed_dim=0)
        return pieces

    def decode(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """As compressed-tensors computes it, in the dtype of the scales."""
        self.require_package()
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        bits = self.grid.bits
        shape = torch.Size(pieces[_SHAPE].tolist())
        scale_OG = pieces[_SCALE].reshape(shape[0], -1)
        stored_OGI = unpack_from_int32(pieces[_PACKED], bits, shape).unflatten(
            1, (scale_OG.shape[1], -1)
        )
        level_OGI: Tensor = stored_OGI.to(scale_OG.dtype)
        if _ZERO in pieces:
            zero_OG = unpack_from_int32(pieces[_ZERO], bits, scale_OG.shape, packed_dim=0)
            level_OGI -= zero_OG.to(scale_OG.dtype)[..., None]
        return (level_OGI * scale_OG[..., None]).flatten(1)

    def weight(self, stored: Mapping[str, Stored], read: Callable[[str], Tensor]) -> Stored:
        require(stored, {_SHAPE: Stored((2,), torch.int64)})
        rows, width = read(_SHAPE).tolist()
        # The scales say how many groups a row has, and the dtype of the weight.
        scale = stored.get(_SCALE, Stored((rows, 1), torch.float32))
        groups = scale.shape[-1] if scale.shape else 0
        symmetric = self.grid.symmetric and _ZERO not in stored
        require(stored, self._tensors((rows, width), scale.dtype, groups, symmetric))
        if groups == 0 or width % groups or not scale.dtype.is_floating_point:
            raise ValueError(f"its {_SCALE} does not divide {width} columns into groups")
        return Stored((rows, width), scale.dtype)


def _other_linears(blocks: BlockList) -> list[str]:
    """Full names of the model's linears that are in no block, are routers or are left alone."""
    packed: set[nn.Module] = {
        linear.module for index in range(len(blocks)) for linear in blocks.linears(index)
    }
    return [
        name
        for name, module in blocks.model.named_modules()
        if isinstance(module, nn.Linear) and module not in packed
    ]
