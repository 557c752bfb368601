"""Which class of transformers builds the model of a configuration."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def auto_class(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any | None:
    """Return the auto class that builds the model as it was saved, None if none does.

    Of a wrapper around a language model, such as one that sees images, that is the class of the
    whole. Where a family has both, the architecture that the configuration names decides.

    Args:
        config: of the model.
        trust_remote_code: let the checkpoint's own Python code run.
    """
    if trust_remote_code and has_own_code(config):
        return AutoModelForCausalLM
    kind = config.model_type
    if MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) in (config.architectures or []):
        return AutoModelForImageTextToText
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return None


def has_own_code(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint comes with code that builds the model."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
