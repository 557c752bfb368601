"""Several recipes on one model under one protocol."""

from secateur.comparison.document import ComparisonResult, Row
from secateur.comparison.run import compare

__all__ = ["ComparisonResult", "Row", "compare"]
