"""Train a pruned model: masks that adapt, distillation from the dense model, zeros that stay."""

from secateur.training.options import PRESETS, Training
from secateur.training.train import TrainResult, train

__all__ = ["PRESETS", "TrainResult", "Training", "train"]
