from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.models.reader import CheckpointReader
from secateur.runs.errors import SecateurError
from tiny import make_checkpoint


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_checkpoint("llama", tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


def test_reads_what_was_written_whatever_the_shards(sharded: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "single")
    single, many = CheckpointReader(tmp_path / "single"), CheckpointReader(sharded)
    assert len(set(many.files.values())) > 1
    assert single.shapes == many.shapes
    left, right = single.read(single.files), many.read(many.files)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_mapped_tensor_outlives_the_open_file(sharded: Path) -> None:
    reader = CheckpointReader(sharded)
    for name, tensor in reader.read(reader.files).items():
        assert torch.equal(reader.mapped(name), tensor)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SecateurError, match=f"{shard.name} is missing"):
        CheckpointReader(sharded)


def test_truncated_shard_is_named_before_any_tensor_is_read(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SecateurError, match=f"{shard.name} is truncated"):
        CheckpointReader(sharded)


def test_index_may_not_point_out_of_its_folder(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.norm.weight"] = "../other.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(SecateurError, match="outside its own folder"):
        CheckpointReader(sharded)


def test_tensor_that_the_index_promises_must_be_there(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.extra.weight"] = sorted(listed["weight_map"].values())[0]
    index.write_text(json.dumps(listed))
    with pytest.raises(SecateurError, match=r"lacks the tensor model\.extra\.weight"):
        CheckpointReader(sharded)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"model\.safetensors is missing"):
        CheckpointReader(tmp_path)


def test_read_tensors_outlive_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    tensors = CheckpointReader(tmp_path).read(["a"])
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert tensors["a"].sum() == 4
