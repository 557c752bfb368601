"""What is no whole, plain checkpoint is refused before any work, with a sentence that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.evaluation.inputs import GivenModel
from secateur.models.checkpoint import Checkpoint
from secateur.models.files import copy_side_files
from secateur.models.inspection import inspect
from secateur.models.locate import load_model
from secateur.runs.errors import SecateurError
from tiny import make_checkpoint

Change = Callable[[Path], None]
Tensors = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors(change: Callable[[Tensors], Any]) -> Change:
    """Change the tensors of a single file in place."""

    def apply(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        change(held)
        save_file(held, folder / SINGLE, metadata={"format": "pt"})

    return apply


def drop(*names: str) -> Change:
    return tensors(lambda held: [held.pop(name) for name in names])


def add(**more: Tensor) -> Change:
    return tensors(lambda held: held.update({n.replace("__", "."): t for n, t in more.items()}))


def rename(change: Callable[[str], str]) -> Change:
    def apply(held: Tensors) -> None:
        renamed = {change(name): tensor for name, tensor in held.items()}
        held.clear()
        held.update(renamed)

    return tensors(apply)


def config(**values: object) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def text(name: str, content: str) -> Change:
    return lambda folder: void((folder / name).write_text(content))


def void(_: object) -> None:
    return None


def quantised(pieces: Callable[[Tensor], Tensors]) -> Change:
    """Put pieces, by what stands for ``weight`` in the name, in place of every linear."""

    def apply(held: Tensors) -> None:
        for name in [name for name in held if name.endswith("_proj.weight")]:
            stem, weight = name.removesuffix("weight"), held.pop(name)
            held.update({stem + piece: tensor for piece, tensor in pieces(weight).items()})

    return tensors(apply)


def gptq(w: Tensor) -> Tensors:
    packed = torch.zeros(w.shape[1] // 8, w.shape[0], dtype=torch.int32)
    return {"qweight": packed, "scales": torch.ones(1, w.shape[0])}


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def sharded(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def listing(change: Callable[[dict[str, str]], object]) -> Change:
    """Cut the file in shards and change what the index lists."""

    def apply(folder: Path) -> None:
        sharded(folder)
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def move_out(folder: Path) -> None:
    shutil.move(folder / SINGLE, folder.parent / "elsewhere.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "elsewhere.safetensors")


def without_file(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


# What is done to a tiny Llama of three blocks, and what the refusal says.
DENSE: dict[str, tuple[Change, str]] = {
    "a linear": (drop(UP), f"lack {UP}: the files are incomplete"),
    "a norm": (drop("model.layers.0.input_layernorm.weight"), "layers.0.input_layernorm.weight"),
    "the last norm": (drop("model.norm.weight"), r"lack model\.norm\.weight"),
    "the embedding": (drop("model.embed_tokens.weight"), r"lack model\.embed_tokens\.weight"),
    "the head": (drop("lm_head.weight"), "lack lm_head.weight: they hold the base model without"),
    "two": (drop(UP, "model.norm.weight"), f"{UP} and model.norm.weight"),
    "blocks in the files": (config(num_hidden_layers=5), "asks for 5 blocks and the files hold 3"),
    "blocks in the config": (config(num_hidden_layers=2), "asks for 2 of model.layers alone"),
    "a width": (config(intermediate_size=96), "shape.*the weights do not belong together"),
    "a vocabulary": (config(vocab_size=300), "has shape .260, 32. where config.json asks for"),
    "gptq": (quantised(gptq), "qweight speaks of quantised weights"),
    "gptq beside": (
        both(text("quantize_config.json", '{"bits": 4}'), drop(UP)),
        "quantize_config.json speaks of quantised weights",
    ),
    "fp8": (
        quantised(
            lambda w: {"weight": w.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}
        ),
        "is stored as float8_e4m3fn.*quantised without a label",
    ),
    "int8": (
        quantised(lambda w: {"weight": w.to(torch.int8), "SCB": torch.ones(len(w))}),
        "is stored as int8",
    ),
    "nf4": (
        quantised(
            lambda w: {
                "weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
                "weight.absmax": torch.ones(4),
            }
        ),
        "is stored as uint8",
    ),
    "compressed": (
        quantised(
            lambda w: {"weight_packed": torch.zeros(4, 4, dtype=torch.int32), "weight_scale": w}
        ),
        "weight_packed speaks of quantised weights",
    ),
    "an adapter's tensors": (
        rename(lambda name: f"base_model.model.{name}.lora_A.weight"),
        "they hold an adapter",
    ),
    "another prefix": (
        rename(lambda name: f"language_model.{name}"),
        r"none of their tensors, such as language_model\.\S+, is one of a llama",
    ),
    "a tensor twice": (
        add(layers__1__mlp__up_proj__weight=torch.ones(64, 32)),
        f"layers.1.mlp.up_proj.weight and {UP} are both to be",
    ),
    "an index beside": (
        both(sharded, lambda f: void(shutil.copy(next(f.glob("model-*")), f / SINGLE))),
        f"holds both {SINGLE} and {INDEX}",
    ),
    "an adapter beside": (
        text("adapter_config.json", "{}"),
        f"adapter_config.json beside {SINGLE}",
    ),
    "an adapter alone": (
        both(
            text("adapter_config.json", '{"base_model_name_or_path": "owner/dense"}'),
            without_file(SINGLE),
        ),
        "an adapter of owner/dense and no model",
    ),
    "pickled": (
        lambda folder: void((folder / SINGLE).rename(folder / "pytorch_model.bin")),
        r"pickled weights \(pytorch_model.bin\)",
    ),
    "stray": (
        lambda folder: void((folder / SINGLE).rename(folder / "consolidated.safetensors")),
        "consolidated.safetensors is not read",
    ),
    "no weights": (without_file(SINGLE), f"{SINGLE} is missing"),
    "a pointer": (
        text(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        "pointer of Git LFS.*git lfs pull",
    ),
    "an empty file": (text(SINGLE, ""), f"{SINGLE} is truncated"),
    "a link that leads out": (move_out, "is a link that leads out"),
    "a missing shard": (
        both(sharded, lambda folder: sorted(folder.glob("model-*"))[1].unlink()),
        "safetensors is missing",
    ),
    "the wrong shard": (
        listing(lambda files: files.update({UP: files["lm_head.weight"]})),
        f"lacks the tensor {UP}",
    ),
    "a file outside": (
        listing(lambda files: files.update({UP: "../other.safetensors"})),
        "outside its own folder",
    ),
    "an absolute path": (listing(lambda files: files.update({UP: "/etc/passwd"})), "outside"),
    "numbers in the index": (listing(lambda files: files.update({UP: 3})), "is no index"),  # type: ignore[dict-item]
    "an index of nothing": (both(text(INDEX, "[]"), without_file(SINGLE)), "is no index"),
}

# The same of a mixture, whose experts are joined on loading.
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
MIXTURE: dict[str, tuple[Change, str]] = {
    "one matrix of an expert": (drop(EXPERT), f"lack {EXPERT}: the files are incomplete"),
    "an expert": (
        drop(*(EXPERT.replace("w1", each) for each in ("w1", "w2", "w3"))),
        r"experts\.2\.w1\.weight, .* and 1 more",
    ),
    "a router": (drop("model.layers.1.block_sparse_moe.gate.weight"), "lack model.layers.1"),
    "experts in the config": (config(num_local_experts=3), "has shape"),
    "experts in the files": (config(num_local_experts=6), r"experts\.4\.w1\.weight"),
    "blocks": (config(num_hidden_layers=4), "asks for 4 blocks and the files hold 3"),
    "a width": (config(intermediate_size=96), "has shape"),
}
ROWS = [("llama", name) for name in DENSE] + [("mixtral", name) for name in MIXTURE]


def checked(folder: Path) -> GivenModel:
    return GivenModel.find(folder, trust_remote_code=False)


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_what_is_not_whole_is_refused_and_named(
    family: str, name: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    change, message = (DENSE if family == "llama" else MIXTURE)[name]
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(family), folder)
    change(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    # Pruning and training, evaluation, counting.
    for use in (Checkpoint.open, checked, inspect):
        with pytest.raises(SecateurError, match=message) as caught:
            use(folder)
        assert str(caught.value).count("\n") == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_an_index_of_the_single_file_is_no_contradiction(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(), folder)
    names = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert Checkpoint.open(folder).reader.homes == names


def test_whole_models_load_from_the_checked_files_alone(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(), folder)
    drop(UP)(folder)
    with pytest.raises(SecateurError, match=f"do not give {UP}"):
        load_model(folder, torch.float32)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(SecateurError, match="pickled"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("swap", [False, True], ids=["embedding", "head"])
def test_tied_weights_may_be_stored_under_either_name(swap: bool, tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path)
    if swap:
        rename(lambda name: name.replace("model.embed_tokens", "lm_head"))(tmp_path)
    found = Checkpoint.open(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    with found.store(torch.device("cpu")).head():
        model = found.blocks.model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight, expected.lm_head.weight)


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["equal", "different"])
def test_tied_weights_that_are_stored_twice(scale: float, tmp_path: Path) -> None:
    """transformers ties them only where they are equal."""
    make_checkpoint("qwen2", tmp_path)

    def twice(held: Tensors) -> None:
        held["lm_head.weight"] = held["model.embed_tokens.weight"] * scale

    tensors(twice)(tmp_path)
    found = Checkpoint.open(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    for _ in range(2):
        with found.store(torch.device("cpu")).head():
            head = found.blocks.model.get_output_embeddings().weight
            assert torch.equal(head, expected.lm_head.weight)
            assert (head is found.blocks.model.get_input_embeddings().weight) == (scale == 1)


def test_tensors_of_the_old_base_model_are_found_without_its_prefix(tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path)
    rename(lambda name: name.removeprefix("model."))(tmp_path)
    found = Checkpoint.open(tmp_path)
    block = found.store(torch.device("cpu")).load(1)
    assert torch.equal(
        block.get_parameter("mlp.up_proj.weight"),
        found.reader.mapped("layers.1.mlp.up_proj.weight"),
    )


def test_links_between_folders_of_the_hub_cache_are_followed(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(checkpoints().iterdir()):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    outside = tmp_path / "outside.txt"
    outside.write_text("not of this checkpoint")
    (snapshot / "notes.txt").symlink_to(outside)
    assert Checkpoint.open(snapshot).reader.shapes
    (tmp_path / "out").mkdir()
    copy_side_files(snapshot, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json"} <= copied
    assert "notes.txt" not in copied


def test_side_files_are_those_that_belong_to_the_weights(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    kept = ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE.md")
    left = (
        *("adapter_config.json", "quantize_config.json", INDEX, "trainer_state.json"),
        *("params.json", "consolidated.safetensors", "optimizer.pt", "training_args.bin"),
    )
    for name in (*kept, *left):
        (tmp_path / "in" / name).write_text("{}")
    copy_side_files(tmp_path / "in", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(kept)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_numbers_outside_the_blocks_are_looked_at(
    name: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(), folder)

    def spoil(held: Tensors) -> None:
        held[name].view(-1)[-1] = torch.nan

    tensors(spoil)(folder)
    store = Checkpoint.open(folder).store(torch.device("cpu"))
    with pytest.raises(SecateurError, match=f"The weights {name} contain NaN"):
        store.check_outside()
