"""What the configuration of a saved checkpoint says: the source's words, and what has changed."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from secateur.models.reader import CheckpointReader

_DTYPES = ("dtype", "torch_dtype")


def saved_config(reader: CheckpointReader, parsed: PreTrainedConfig) -> dict[str, Any]:
    """Return the source's config.json for the result.

    Positions are said in both ways: transformers before 5, llama.cpp and others read
    ``rope_theta``, later ones ``rope_parameters``. Where tensors are cast, so is the dtype.

    Args:
        reader: of the source.
        parsed: its configuration, as transformers understands it.
    """
    config = dict(_with_positions(reader.config, parsed))
    if reader.cast is None:
        return config
    name = str(reader.cast).removeprefix("torch.")
    return _with_dtype(config, name) | ({} if "torch_dtype" in config else {"dtype": name})


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The same with another dtype, wherever one is named for the model or a part of it."""
    return {
        key: name
        if key in _DTYPES and value is not None
        else _with_dtype(value, name)
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
        else value
        for key, value in config.items()
    }


def _with_positions(config: dict[str, Any], parsed: PreTrainedConfig) -> dict[str, Any]:
    """The same with ``rope_theta`` and ``rope_parameters``, if they are of one kind in all blocks.

    What is added has to mean what was there; otherwise nothing is.
    """
    rope = getattr(parsed, "rope_parameters", None)
    if parsed.get_text_config() is not parsed or not isinstance(rope, dict):
        return config
    if not isinstance(rope.get("rope_theta"), int | float):
        return config
    told = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        told["rope_scaling"] = {name: rope[name] for name in rope if name not in told}
    added = {**told, "rope_parameters": dict(rope)}
    present = {name: value for name, value in config.items() if value is not None}
    both = {**config, **{name: value for name, value in added.items() if name not in present}}
    try:
        again = type(parsed).from_dict(_with_floats(both))
    except (ValueError, TypeError, KeyError):
        return config
    return both if again.rope_parameters == rope else config


def _with_floats(value: Any) -> Any:
    """A copy with numbers in the place of what stands for infinities in JSON."""
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {name: _with_floats(each) for name, each in value.items()}
