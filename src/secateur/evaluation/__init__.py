"""Evaluation: perplexity, distance from the dense model, and answers to zero-shot tasks."""

from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.perplexity import perplexity
from secateur.evaluation.tasks import TASKS
from secateur.report.documents.evaluation import (
    Difference,
    Divergence,
    Evaluation,
    Figures,
    Protocol,
    TaskScore,
    TaskScores,
    ZeroShot,
)

__all__ = [
    "TASKS",
    "Difference",
    "Divergence",
    "Evaluation",
    "Figures",
    "Protocol",
    "TaskScore",
    "TaskScores",
    "ZeroShot",
    "evaluate",
    "perplexity",
]
