"""Where the blocks and linears of a model are, found by structure."""

from secateur.architecture.blocks import BlockList, find_blocks
from secateur.architecture.linears import Linear, find_linears

__all__ = ["BlockList", "Linear", "find_blocks", "find_linears"]
