"""Write a folder for OpenVINO: a model that keeps keys and values itself, and its tokenizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from secateur.deploy.bench.runtimes.openvino import XML, inputs_of
from secateur.evaluation.predictions import Predictions
from secateur.models.files import copy_side_files
from secateur.models.locate import load_config, load_model, load_tokenizer
from secateur.runs.errors import SecateurError, explained
from secateur.runs.files import write_folder
from secateur.runs.progress import Progress
from secateur.text.calibration import load_calibration
from secateur.text.options import CalibrationOptions

Type = Literal["f32", "f16", "bf16", "int8", "w8a8"]
"""How matrices are stored. It computes in what the processor is fastest at; w8a8 in 8 bits."""

# What takes its time, in this order.
_LOADING, _TRACING, _CHECKING = "Loading the model", "Tracing the graph", "Checking the result"
# Packages that the extra of this name brings, and what imports them.
_PACKAGES = {"openvino": "openvino", "nncf": "nncf", "openvino-tokenizers": "openvino_tokenizers"}
# Tokens that the written model is asked about: some at once, the others one by one.
_AT_ONCE, _ONE_BY_ONE = 24, 8
# Nats per token that the written model may differ by where nothing was quantised.
_TOLERANCE = 1e-3


def write(
    path: Path,
    folder: Path,
    type: Type,
    calibration: CalibrationOptions,
    *,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[str, list[str]]:
    """Write a checkpoint to the folder ``path``, whole or not at all.

    The graph is made by the exporter of transformers, int8 and w8a8 by NNCF: one scale for each
    row, and zeros stay. The folder also has OpenVINO's own form of the tokenizer and what lies
    beside the weights. All of the model is in memory: for f32 and w8a8 in 32 bits, else as it is
    stored.

    Args:
        path: the new folder.
        folder: the checkpoint.
        type: how matrices are stored.
        calibration: text that the activations of w8a8 are measured on.
        trust_remote_code: let the checkpoint's own Python code run.
        progress: told how far it is.

    Returns:
        Name of the model's class, and notes for the user.

    Raises:
        SecateurError: a package is missing, the checkpoint cannot be loaded, OpenVINO does not
            compute the same, or the folder cannot be written.
    """
    _require_packages()
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if config.get_text_config() is not config:
        raise SecateurError(
            f"{folder} reads more than text, and only models of text are exported to OpenVINO."
        )
    progress(_LOADING, 0, 1)
    model = load_model(folder, "auto", trust_remote_code=trust_remote_code)
    _convert(model, type, folder)
    probe_L = _probe(config.vocab_size)
    expected = _ask(model, probe_L)
    progress(_LOADING, 1, 1)
    text_SL = None
    if type == "w8a8":
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        text_SL = load_calibration(
            calibration,
            tokenizer,
            model_loader=lambda: model,
            rows=config.vocab_size,
            progress=progress,
        ).tokens
    notes: list[str] = []

    def fill(part: Path) -> None:
        with explained(f"{folder} cannot be exported to OpenVINO", "export it to gguf instead."):
            progress(_TRACING, 0, 1)
            with _quiet():
                exported = _trace(model, type, text_SL)
                copy_side_files(folder, part)
                exported.save_pretrained(part)
            notes.extend(_write_tokenizer(folder, part, trust_remote_code))
        progress(_TRACING, 1, 1)
        progress(_CHECKING, 0, 1)
        divergence = expected.divergence(_ask_written(part / XML, probe_L))
        notes.extend(_judge(divergence, type, folder))

    write_folder(path, fill)
    progress(_CHECKING, 1, 1)
    return (config.architectures or [config.model_type])[0], notes


def _require_packages() -> None:
    missing = [package for package, module in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise SecateurError(
            f"Export to OpenVINO needs {', '.join(missing)}; `pip install 'secateur[openvino]'` "
            "brings what is missing."
        )


def _convert(model: PreTrainedModel, type: Type, folder: Path) -> None:
    """Turn weights into the type that they are stored in; int8 begins with what is there."""
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    # Calibration runs in 32 bits.
    dtype = {**dtypes, "w8a8": torch.float32}.get(type)
    if dtype is None:
        return
    limit = torch.finfo(dtype).max
    for name, tensor in model.named_parameters():
        if tensor.numel() and tensor.abs().max() > limit:
            raise SecateurError(
                f"{name} of {folder} holds values beyond what {type} can hold; use --type bf16."
            )
    model.to(dtype)  # type: ignore[arg-type]


def _trace(model: PreTrainedModel, type: Type, text_SL: Tensor | None = None) -> Any:
    """The model as a graph of OpenVINO, for any number of sequences, tokens and tokens before."""
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter
    from transformers.exporters.utils import get_leaf_tensors

    before, tokens = 4, 3
    ids_BL = torch.ones(2, before, dtype=torch.long)
    # Every block keeps all it has seen; masks alone make windows of it.
    cache = DynamicCache()
    with torch.inference_mode():
        model(ids_BL, past_key_values=cache, use_cache=True)
    inputs: dict[str, Any] = {
        "input_ids": torch.ones(2, tokens, dtype=torch.long),
        "attention_mask": torch.ones(2, before + tokens, dtype=torch.long),
        "position_ids": torch.arange(before, before + tokens).repeat(2, 1),
        "past_key_values": cache,
        "use_cache": True,
    }
    _fill_empty(model)
    free = Dim.AUTO
    shapes: dict[str, Any] = {
        name: {0: free, 1: free} for name in ("input_ids", "attention_mask", "position_ids")
    }
    shapes["past_key_values"] = [{0: free, 2: free} for _ in get_leaf_tensors(cache)]
    quantizer = _quantizer(type, cache, text_SL)
    exported = OpenVINOExporter().export(
        model, inputs, OpenVINOConfig(dynamic=True, dynamic_shapes=shapes, quantizer=quantizer)
    )
    _widen_broadcasts(exported.program)
    # The exporter asks for the precision of the weights; OpenVINO knows what the processor is
    # fastest at, and the user can still say.
    del exported.program.get_rt_info()["runtime_options"]
    return exported


def _quantizer(type: Type, cache: DynamicCache, text_SL: Tensor | None) -> Any:
    """What makes integers of the graph; None for types that need none."""
    import nncf
    from transformers.exporters.quantizers import quantizer_nncf

    if text_SL is not None:
        samples = [_sample(ids_L, cache) for ids_L in text_SL]
        return quantizer_nncf.NNCFOpenVINOQuantizer(
            quantizer_nncf.NNCFQuantizationConfig(subset_size=len(samples)), samples
        )
    if type == "int8":
        mode = nncf.CompressWeightsMode.INT8_SYM
        return quantizer_nncf.NNCFOpenVINOQuantizer(
            quantizer_nncf.NNCFWeightCompressionConfig(mode=mode)
        )
    return None


def _sample(ids_L: Tensor, cache: DynamicCache) -> dict[str, Any]:
    """Inputs of the graph for one window, with nothing before it."""
    empty = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values  # type: ignore[union-attr]
        assert keys is not None and values is not None, "every block has seen text"
        empty.update(keys[:1, :, :0].clone(), values[:1, :, :0].clone(), index)
    return {
        "input_ids": ids_L[None],
        "attention_mask": torch.ones_like(ids_L)[None],
        "position_ids": torch.arange(len(ids_L))[None],
        "past_key_values": empty,
    }


def _widen_broadcasts(program: Any) -> None:
    """Repeat keys and values for their queries by the operation that OpenVINO expects there.

    The exporter turns it into another, of which OpenVINO does not make one attention with its
    cache: a step is then slower.
    """
    from openvino import opset14 as operations

    for node in program.get_ordered_ops():
        if node.get_type_name() != "Broadcast" or node.get_attributes()["mode"] != "numpy":
            continue
        # Its shape is the wanted one wherever the tensor has a single position.
        shape = node.input_value(1).get_node()
        if shape.get_type_name() == "Select":
            wide = operations.broadcast(
                node.input_value(0), shape.input_value(1), broadcast_spec="BIDIRECTIONAL"
            )
            wide.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(wide.output(0))


def _fill_empty(model: PreTrainedModel) -> None:
    """Let linears without inputs return their bias; OpenVINO makes garbage of an empty product."""

    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        zeros = x.new_zeros(*x.shape[:-1], linear.out_features)
        return zeros if linear.bias is None else zeros + linear.bias

    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features == 0:
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def _write_tokenizer(folder: Path, part: Path, trust_remote_code: bool) -> list[str]:
    """Write the tokenizer as OpenVINO's own models, which OpenVINO GenAI reads."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except SecateurError:
        return ["There is no tokenizer to write; OpenVINO GenAI will ask for one."]
    try:
        with _quiet():
            encode, decode = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # Of many kinds; the model is of use without it.
        return [f"OpenVINO has no form of this tokenizer ({error}); encode text with transformers."]
    openvino.save_model(encode, part / "openvino_tokenizer.xml")
    openvino.save_model(decode, part / "openvino_detokenizer.xml")
    return []


def _probe(vocabulary: int) -> Tensor:
    """Tokens from all over the vocabulary, int64 (tokens,)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_AT_ONCE + _ONE_BY_ONE,), generator=generator)


def _ask(model: PreTrainedModel, ids_L: Tensor) -> Predictions:
    with torch.inference_mode():
        return Predictions(model(ids_L[None]).logits[0].float())


def _ask_written(path: Path, ids_L: Tensor) -> Predictions:
    """What the written model predicts, the last tokens from keys and values that it kept."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()
    parts, seen = [], 0
    for count in (_AT_ONCE, *[1] * _ONE_BY_ONE):
        request.infer(inputs_of(ids_L[None, seen : seen + count].numpy(), seen))
        seen += count
        parts.append(torch.from_numpy(request.get_output_tensor(0).data[0].copy()))
    return Predictions(torch.cat(parts).float())


def _judge(divergence_L: Tensor, type: Type, folder: Path) -> list[str]:
    """Refuse a model that computes something else; say what integers change."""
    mean = float(divergence_L.mean())
    if type in ("int8", "w8a8"):
        return [f"{type} moves predictions by {mean:.2g} nats a token (KL, on random tokens)."]
    if not mean < _TOLERANCE:
        raise SecateurError(
            f"What OpenVINO computes of {folder} differs from transformers by {mean:.2g} nats a "
            "token (KL); nothing was written, export it to gguf instead."
        )
    return []


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says of its own versions and ways to itself."""
    others = logging.getLogger("nncf")
    levels = transformers_logging.get_verbosity(), others.level
    transformers_logging.set_verbosity_error()
    others.setLevel(logging.ERROR)
    try:
        # NNCF shows bars of its own.
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        others.setLevel(levels[1])
