"""Evaluation: perplexity of a model on a text, and its distance from the dense model."""

from secateur.evaluation.evaluate import Divergence, Evaluation, Figures, Protocol, evaluate
from secateur.evaluation.perplexity import perplexity

__all__ = ["Divergence", "Evaluation", "Figures", "Protocol", "evaluate", "perplexity"]
