"""Linears in the pack-quantized form of compressed-tensors: integers of a few bits in int32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.structure import BlockList, find_linears
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import GridOptions, QuantisedSolution

_FORMAT = "pack-quantized"
_WEIGHT = "weight"
PACKED, SCALE, _ZERO, SHAPE = (
    f"{_WEIGHT}_{part}" for part in ("packed", "scale", "zero_point", "shape")
)
PIECES = (PACKED, SCALE, _ZERO, SHAPE)


def require_package() -> None:
    """Raise SecateurError if compressed-tensors is not installed."""
    if find_spec("compressed_tensors") is None:
        raise SecateurError(
            "Packed weights need the package compressed-tensors; install secateur[quantize]."
        )


def check_packable(blocks: BlockList) -> None:
    """Raise SecateurError if a linear of the blocks has no place in the format."""
    require_package()
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if parameter.ndim > 2:
                raise _no_place(f"{blocks.name(index)}.{name}", "stacks experts")
        for linear in find_linears(block):
            if linear.transposed:
                raise _no_place(f"{blocks.name(index)}.{linear.name}", "is stored as (in, out)")


def _no_place(name: str, why: str) -> SecateurError:
    return SecateurError(
        f"{name} {why}, which the packed format does not take; use --quantized-format dequantized."
    )


def pack(weight_name: str, quantised: QuantisedSolution, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is saved for a weight, by name in the files.

    Args:
        weight_name: its name in the files, ending in ``weight``.
        quantised: levels, and a grid whose scales are representable in ``dtype``.
        dtype: of the scales, and of the weight when it is unpacked.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid, level_OI = quantised.grid, quantised.level_OI
    bits = grid.options.bits
    zero_OI = grid.zero_OG.repeat_interleave(level_OI.shape[1] // grid.zero_OG.shape[1], dim=1)
    pieces = {
        PACKED: pack_to_int32((level_OI + zero_OI).to(torch.int8), bits),
        SCALE: grid.scale_OG.to(dtype),
        SHAPE: torch.tensor(level_OI.shape),
    }
    if not grid.options.symmetric:
        pieces[_ZERO] = pack_to_int32(grid.zero_OG.to(torch.int8), bits, packed_dim=0)
    prefix = weight_name.removesuffix(_WEIGHT)
    return {prefix + piece: tensor for piece, tensor in pieces.items()}


def packed_bytes(shape: tuple[int, int], options: GridOptions, dtype: torch.dtype) -> int:
    """Bytes of what ``pack`` returns for a weight.

    Args:
        shape: of the weight, (out, in).
        options: of its grid.
        dtype: of the scales.
    """
    rows, width = shape
    groups = width // options.columns(width)
    size = rows * _words(width, options.bits) + rows * groups * dtype.itemsize
    if not options.symmetric:
        size += groups * _words(rows, options.bits)
    return size + len(shape) * torch.int64.itemsize


def _words(integers: int, bits: int) -> int:
    """Bytes of the int32 that integers of a few bits fill without gaps."""
    return math.ceil(integers * bits / 32) * torch.int32.itemsize


def unpack(pieces: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return the weight (out, in) in the dtype of its scales, as compressed-tensors computes it.

    Args:
        pieces: tensors by the last part of their names.
        bits: of an integer.
    """
    require_package()
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(pieces[SHAPE].tolist())
    scale_OG = pieces[SCALE].reshape(shape[0], -1)
    stored_OGI = unpack_from_int32(pieces[PACKED], bits, shape).unflatten(
        1, (scale_OG.shape[1], -1)
    )
    level_OGI: Tensor = stored_OGI.to(scale_OG.dtype)
    if _ZERO in pieces:
        zero_OG = unpack_from_int32(pieces[_ZERO], bits, scale_OG.shape, packed_dim=0)
        level_OGI -= zero_OG.to(scale_OG.dtype)[..., None]
    return (level_OGI * scale_OG[..., None]).flatten(1)


def describe(options: GridOptions, ignored: Iterable[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a packed checkpoint.

    Args:
        options: of all packed linears.
        ignored: names of the linears that are not packed.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    weights = QuantizationArgs(
        num_bits=options.bits,
        symmetric=options.symmetric,
        strategy="group" if options.group else "channel",
        group_size=options.group or None,
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format=_FORMAT,
        quantization_status="compressed",
        ignore=sorted(ignored),
    )
    described: dict[str, Any] = config.model_dump(mode="json")
    if not options.symmetric:
        # transformers makes room for unpacked zero points, unless it unpacks while it loads.
        described["dequantize"] = True
    return described


def unpacked_linears(blocks: BlockList) -> list[str]:
    """Full names of the model's linears that are in no block, or routers."""
    packed: set[nn.Module] = {linear.module for block in blocks for linear in find_linears(block)}
    return [
        name
        for name, module in blocks.model.named_modules()
        if isinstance(module, nn.Linear) and module not in packed
    ]


def packed_bits(described: Mapping[str, Any]) -> int | None:
    """Bits of the packed weights that a ``quantization_config`` describes, None for other formats.

    Checkpoints that mix several widths are not among those that can be read.
    """
    groups = described.get("config_groups") or {}
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups.values()}
    if described.get("format") != _FORMAT or len(bits) != 1:
        return None
    return next(iter(bits))
