"""A tiny model in the files of another runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_POSITIONS = 64


def write_openvino(folder: Path, vocabulary: int = 32, width: int = 8) -> None:
    """An OpenVINO model that keeps what it has read: logits of a token are the mean so far."""
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    draw = np.random.default_rng(0)
    tokens_BL = ops.parameter([-1, -1], ov.Type.i64, name="input_ids")
    order_B = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    for node, name in ((tokens_BL, "input_ids"), (order_B, "beam_idx")):
        node.output(0).get_tensor().set_names({name})
    table_VH = ops.constant(draw.normal(size=(vocabulary, width)).astype(np.float32))
    zero = ops.constant(np.int64(0))
    new_BLH = ops.gather(table_VH, tokens_BL, zero)
    information = VariableInfo()
    information.data_shape = ov.PartialShape([-1, -1, width])
    information.data_type = ov.Type.f32
    information.variable_id = "cache"
    variable = Variable(information)
    batch_1 = ops.gather(ops.shape_of(tokens_BL), ops.constant(np.array([0])), zero)
    empty_3 = ops.concat([batch_1, ops.constant(np.array([0, width]))], 0)
    start_B0H = ops.broadcast(ops.constant(np.float32(0)), empty_3)
    kept_BPH = ops.gather(ops.read_value(start_B0H, variable), order_B, zero)
    all_BPH = ops.concat([kept_BPH, new_BLH], 1)
    mean_B1H = ops.reduce_mean(all_BPH, ops.constant(np.int64(1)), True)
    logits_BLV = ops.matmul(ops.add(new_BLH, mean_B1H), table_VH, False, True)
    logits_BLV.output(0).get_tensor().set_names({"logits"})
    model = ov.Model([logits_BLV.output(0)], [ops.assign(all_BPH, variable)], [tokens_BL, order_B])
    folder.mkdir(parents=True)
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    config = {"vocab_size": vocabulary, "max_position_embeddings": _POSITIONS}
    (folder / "config.json").write_text(json.dumps(config))
