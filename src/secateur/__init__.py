"""Prune large language models so that it pays.

The names below are the Python interface; the command line is a thin shell over them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.comparison import ComparisonResult, compare
    from secateur.deploy.accelerator import Accelerator, Memory
    from secateur.deploy.bench.bench import bench
    from secateur.deploy.export import ExportResult, export
    from secateur.deploy.simulation import Simulation, simulate
    from secateur.deploy.targets import Targets, targets
    from secateur.estimation.estimate import estimate
    from secateur.evaluation.continuations import Continuations, continue_texts
    from secateur.evaluation.evaluate import evaluate
    from secateur.models.inspection import Inspection, inspect
    from secateur.patterns.pattern import NM, Unstructured, parse_pattern
    from secateur.patterns.plan import Plan
    from secateur.pruning.prune import PruneResult, plan, prune
    from secateur.pruning.recipe import Recipe
    from secateur.report.documents.bench import Bench
    from secateur.report.documents.evaluation import Evaluation
    from secateur.report.documents.prune import Estimate
    from secateur.report.page import write_report
    from secateur.runs.errors import SecateurError
    from secateur.shrinking.options import ShrinkOptions
    from secateur.shrinking.shrink import ShrinkResult, shrink
    from secateur.training.options import Training
    from secateur.training.recover import RecoverResult, recover
    from secateur.training.recovery_options import Recovery
    from secateur.training.train import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Accelerator",
    "Bench",
    "ComparisonResult",
    "Continuations",
    "Estimate",
    "Evaluation",
    "ExportResult",
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
    "Targets",
    "TrainResult",
    "Training",
    "Unstructured",
    "bench",
    "compare",
    "continue_texts",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "parse_pattern",
    "plan",
    "prune",
    "recover",
    "shrink",
    "simulate",
    "targets",
    "train",
    "write_report",
]

_HOMES = {
    "NM": "patterns.pattern",
    "Accelerator": "deploy.accelerator",
    "Bench": "report.documents.bench",
    "ComparisonResult": "comparison",
    "Continuations": "evaluation.continuations",
    "Estimate": "report.documents.prune",
    "Evaluation": "report.documents.evaluation",
    "ExportResult": "deploy.export",
    "Inspection": "models.inspection",
    "Memory": "deploy.accelerator",
    "Plan": "patterns.plan",
    "PruneResult": "pruning.prune",
    "Recipe": "pruning.recipe",
    "RecoverResult": "training.recover",
    "Recovery": "training.recovery_options",
    "SecateurError": "runs.errors",
    "ShrinkOptions": "shrinking.options",
    "ShrinkResult": "shrinking.shrink",
    "Simulation": "deploy.simulation",
    "Targets": "deploy.targets",
    "TrainResult": "training.train",
    "Training": "training.options",
    "Unstructured": "patterns.pattern",
    "bench": "deploy.bench.bench",
    "compare": "comparison",
    "continue_texts": "evaluation.continuations",
    "estimate": "estimation.estimate",
    "evaluate": "evaluation.evaluate",
    "export": "deploy.export",
    "inspect": "models.inspection",
    "parse_pattern": "patterns.pattern",
    "plan": "pruning.prune",
    "prune": "pruning.prune",
    "recover": "training.recover",
    "shrink": "shrinking.shrink",
    "simulate": "deploy.simulation",
    "targets": "deploy.targets",
    "train": "training.train",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and ``secateur --help`` needs neither.
    if name in _HOMES:
        return getattr(import_module(f"secateur.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
