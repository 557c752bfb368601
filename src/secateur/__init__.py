"""Prune large language models so that it pays.

The names below are the Python interface; the command line is a thin shell over them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.comparison import ComparisonResult, compare
    from secateur.deploy.accelerator import Accelerator, Memory
    from secateur.deploy.simulation import Simulation, simulate
    from secateur.errors import SecateurError
    from secateur.estimation import Estimate, estimate
    from secateur.evaluation import Evaluation, evaluate
    from secateur.inspection import Inspection, inspect
    from secateur.pattern import NM, Unstructured, parse_pattern
    from secateur.planning import Plan
    from secateur.pruning import PruneResult, plan, prune
    from secateur.recipe import Recipe
    from secateur.recovery.options import Recovery
    from secateur.recovery.recover import RecoverResult, recover
    from secateur.report.continuations import Continuations, continue_texts
    from secateur.report.page import write_report
    from secateur.structured.options import ShrinkOptions
    from secateur.structured.shrinking import ShrinkResult, shrink
    from secateur.training import Training, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Accelerator",
    "ComparisonResult",
    "Continuations",
    "Estimate",
    "Evaluation",
    "Inspection",
    "Memory",
    "Plan",
    "PruneResult",
    "Recipe",
    "RecoverResult",
    "Recovery",
    "SecateurError",
    "ShrinkOptions",
    "ShrinkResult",
    "Simulation",
    "TrainResult",
    "Training",
    "Unstructured",
    "compare",
    "continue_texts",
    "estimate",
    "evaluate",
    "inspect",
    "parse_pattern",
    "plan",
    "prune",
    "recover",
    "shrink",
    "simulate",
    "train",
    "write_report",
]

_HOMES = {
    "NM": "pattern",
    "Accelerator": "deploy.accelerator",
    "ComparisonResult": "comparison",
    "Continuations": "report.continuations",
    "Estimate": "estimation",
    "Evaluation": "evaluation",
    "Inspection": "inspection",
    "Memory": "deploy.accelerator",
    "Plan": "planning",
    "PruneResult": "pruning",
    "Recipe": "recipe",
    "RecoverResult": "recovery.recover",
    "Recovery": "recovery.options",
    "SecateurError": "errors",
    "ShrinkOptions": "structured.options",
    "ShrinkResult": "structured.shrinking",
    "Simulation": "deploy.simulation",
    "TrainResult": "training.train",
    "Training": "training.options",
    "Unstructured": "pattern",
    "compare": "comparison",
    "continue_texts": "report.continuations",
    "estimate": "estimation",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "parse_pattern": "pattern",
    "plan": "pruning",
    "prune": "pruning",
    "recover": "recovery.recover",
    "shrink": "structured.shrinking",
    "simulate": "deploy.simulation",
    "train": "training.train",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and ``secateur --help`` needs neither.
    if name in _HOMES:
        return getattr(import_module(f"secateur.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
