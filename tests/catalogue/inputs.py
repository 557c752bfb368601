"""Bad inputs as data: what is done to good ones, and the commands that could take the result.

Each is made in a folder with ``model``, a tiny checkpoint, ``dense``, another copy of it, and
``text.txt``. The working folder of the commands is that folder.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny import make_checkpoint

Make = Callable[[Path], object]

# Every command that reads a model, in every role.
LOOKING = ("plan", "estimate", "inspect", "simulate")
WORKING = (
    "prune", "fit", "shrink", "train", "recover", "teach", "eval", "against", "export", "bench",
)  # fmt: skip
MODEL = (*LOOKING, *WORKING)
READING_TEXT = ("fit", "shrink", "train", "recover", "eval")
SPEAKING = ("prune", "fit", "shrink", "train", "recover", "eval", "export")
RECIPE = ("by recipe", "plan", "estimate")


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        name: what is bad.
        make: makes it, given the folder.
        commands: names of commands, or whole command lines.
        more: words behind each of them.
    """

    name: str
    make: Make
    commands: tuple[str, ...]
    more: str = ""


def nothing(folder: Path) -> None:
    """The command line is what is bad."""


def raw(name: str, content: bytes) -> Make:
    def make(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


def edited(name: str, change: Callable[[Any], object]) -> Make:
    def make(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return make


def config(**changes: Any) -> Make:
    return edited("model/config.json", lambda values: values.update(changes))


def without(*names: str) -> Make:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return make


def folder_in_place(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return make


def pipe_in_place(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link_in_place(name: str, target: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def cut(name: str, share: float) -> Make:
    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return make


def large(name: str, begins: bytes = b"") -> Make:
    """A file of 100 MB that takes no room."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(begins)
            file.truncate(100 << 20)

    return make


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    def make(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return make


def header(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        values = json.loads(content[8 : 8 + size])
        change(values)
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return make


def index(content: Any) -> Make:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()

    def make(folder: Path) -> None:
        (folder / "model" / "model.safetensors").rename(folder / "model" / "a.safetensors")
        (folder / "model" / "model.safetensors.index.json").write_bytes(text)

    return make


def checkpoint(family: str, **changes: Any) -> Make:
    def make(folder: Path) -> None:
        shutil.rmtree(folder / "model")
        make_checkpoint(family, folder / "model")
        config(**changes)(folder)

    return make


DEEP = b"[" * 100_000
NOT_JSON = {
    "null": b"null",
    "list": b"[]",
    "number": b"5",
    "string": b'"x"',
    "empty": b"",
    "zeros": bytes(100),
    "half": b'{"model_type": "lla',
    "nested": DEEP,
    "nested objects": b'{"a":' * 100_000,
    "huge number": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "Latin-1": '{"model_type": "é"}'.encode("latin-1"),
}

_CONFIG = {
    "model_type": [["llama"], "nope", "t5", None, 5, "../x", ""],
    "hidden_size": ["32", -32, 0, 10**30, 10**9, None, 33.5, [32], 64],
    "num_hidden_layers": [10**6, 10**30, -1, "3", 2.5, None, [3]],
    "num_attention_heads": [0, -4, 10**9, 3, "4", None],
    "num_key_value_heads": [0, 3, -2, "2"],
    "intermediate_size": [-1, 128, 10**12, "64", None],
    "vocab_size": [0, -1, 10, 10**12, "260", None],
    "head_dim": [0, -8, 7, 10**9, "8"],
    "max_position_embeddings": ["64", [64]],
    "hidden_act": ["boom", 5, None, ["silu"]],
    "rope_parameters": [{"rope_type": "nope"}, "x", {"rope_type": 5}, [1]],
    "rms_norm_eps": ["x", [1]],
    "dtype": ["float99", 5, ["float32"]],
    "attn_implementation": ["evil", "someone/kernel"],
    "quantization_config": ["gptq", [], {"quant_method": "gptq"}, {"quant_method": 5}, {}],
    "auto_map": [["AutoConfig"]],
    "architectures": ["LlamaForCausalLM"],
    "layer_types": [["full_attention"], "x", [5, 5, 5], ["nope"] * 3],
    "pad_token_id": [10**6],
    "pretraining_tp": ["x"],
    "attention_bias": [[1]],
    "text_config": [{"num_hidden_layers": 10**7}],
}

CONFIGURATIONS = [
    *(
        Bad(f"config.json: {name}", raw("model/config.json", content), MODEL)
        for name, content in NOT_JSON.items()
    ),
    *(
        Bad(f"config.json: {key} is {str(value)[:30]}", config(**{key: value}), MODEL)
        for key, values in _CONFIG.items()
        for value in values
    ),
    Bad(
        "config.json: a key twice",
        raw("model/config.json", b'{"model_type": "llama", "model_type": "gpt2"}'),
        MODEL,
    ),
    Bad("config.json: 100 MB", large("model/config.json", b"{"), MODEL),
    Bad("config.json: missing", without("model/config.json"), MODEL),
    Bad("config.json: a folder", folder_in_place("model/config.json"), MODEL),
    Bad("config.json: a pipe", pipe_in_place("model/config.json"), MODEL),
    Bad("config.json: a link to nothing", link_in_place("model/config.json", "no"), MODEL),
    Bad("config.json: a link to itself", link_in_place("model/config.json", "config.json"), MODEL),
    Bad("config.json: tables of a million positions", checkpoint("gpt2", n_positions=10**6), MODEL),
    *(
        Bad(f"generation_config.json: {name}", raw("model/generation_config.json", content), MODEL)
        for name, content in NOT_JSON.items()
        if name not in ("huge number", "Latin-1")
    ),
]


def _renamed(values: dict[str, torch.Tensor]) -> None:
    values["other"] = values.pop("model.layers.0.mlp.up_proj.weight")


def _first(change: Callable[[dict[str, Any]], object]) -> Make:
    return header(lambda values: change(values["model.layers.0.mlp.up_proj.weight"]))


WEIGHTS_FILE = "model/model.safetensors"
WEIGHTS = [
    Bad("weights: missing", without(WEIGHTS_FILE), MODEL),
    Bad("weights: empty", raw(WEIGHTS_FILE, b""), MODEL),
    Bad("weights: seven bytes", raw(WEIGHTS_FILE, b"1234567"), MODEL),
    Bad("weights: a header of 2^63", raw(WEIGHTS_FILE, b"\xff" * 7 + b"\x7f" + b"{}"), MODEL),
    Bad("weights: no JSON", raw(WEIGHTS_FILE, struct.pack("<Q", 4) + b"nope"), MODEL),
    Bad("weights: a header of a list", raw(WEIGHTS_FILE, struct.pack("<Q", 2) + b"[]"), MODEL),
    Bad("weights: a nested header", raw(WEIGHTS_FILE, struct.pack("<Q", 10**5) + DEEP), MODEL),
    Bad("weights: half", cut(WEIGHTS_FILE, 0.5), MODEL),
    Bad("weights: half a header", cut(WEIGHTS_FILE, 0.01), MODEL),
    Bad("weights: unknown dtype", _first(lambda each: each.update(dtype="F99")), MODEL),
    Bad("weights: negative shape", _first(lambda each: each.update(shape=[-64, -32])), MODEL),
    Bad("weights: shape of text", _first(lambda each: each.update(shape="x")), MODEL),
    Bad("weights: huge shape", _first(lambda each: each.update(shape=[2**62, 2**62])), MODEL),
    Bad("weights: far offsets", _first(lambda each: each.update(data_offsets=[0, 2**60])), MODEL),
    Bad("weights: no offsets", _first(lambda each: each.pop("data_offsets")), MODEL),
    Bad("weights: a folder", folder_in_place(WEIGHTS_FILE), MODEL),
    Bad("weights: a pipe", pipe_in_place(WEIGHTS_FILE), MODEL),
    Bad("weights: a link to nothing", link_in_place(WEIGHTS_FILE, "no"), MODEL),
    Bad(
        "weights: a tensor of another shape",
        tensors(
            lambda each: each.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 31)})
        ),
        MODEL,
    ),
    Bad(
        "weights: a tensor without dimensions",
        tensors(lambda each: each.update({"model.norm.weight": torch.tensor(1.0)})),
        MODEL,
    ),
    Bad(
        "weights: a tensor of another name",
        tensors(_renamed),
        MODEL,
    ),
    Bad(
        "weights: a tensor less",
        tensors(lambda each: each.pop("model.layers.1.self_attn.q_proj.weight")),
        MODEL,
    ),
    Bad(
        "weights: a block less",
        config(num_hidden_layers=4),
        MODEL,
    ),
    Bad(
        "weights: none",
        tensors(lambda each: each.clear()),
        MODEL,
    ),
    Bad(
        "weights: an embedding of NaN",
        tensors(lambda each: each["model.embed_tokens.weight"].fill_(float("nan"))),
        ("eval", "against"),
    ),
    Bad(
        "weights: a pointer of Git LFS",
        raw(WEIGHTS_FILE, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        MODEL,
    ),
    Bad(
        "weights: an index of two files of which one is there",
        index({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}),
        MODEL,
    ),
    *(
        Bad(f"index: {name}", index(content), MODEL)
        for name, content in {
            "null": b"null",
            "a list": b"[]",
            "of a list": {"weight_map": ["a"]},
            "of nothing": {"weight_map": {}},
            "of numbers": {"weight_map": {"a": 5}},
            "of null": {"weight_map": None},
            "half": b'{"weight_map"',
            "nested": DEEP,
            "UTF-16": '{"weight_map": {}}'.encode("utf-16"),
            "outside": {"weight_map": {"a": "../dense/model.safetensors"}},
            "absolute": {"weight_map": {"a": "/etc/passwd"}},
            "NUL": {"weight_map": {"a": "a\0.safetensors"}},
            "a long name": {"weight_map": {"a": "a" * 300}},
            "a folder": {"weight_map": {"a": "."}},
            "an unknown tensor": {"weight_map": {"nope": "a.safetensors"}},
        }.items()
    ),
    *(
        Bad(
            f"GGUF: {name}",
            raw("model.gguf", content),
            tuple(
                f"{each} model.gguf{rest}"
                for each, rest in {
                    "estimate": "",
                    "prune": " -o out --method magnitude",
                    "eval": " --text text.txt",
                }.items()
            ),
        )
        for name, content in {
            "empty": b"",
            "four bytes": b"GGUF",
            "no magic": b"FUGG" + bytes(100),
            "version 99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
            "nothing in it": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
            "2^63 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63),
            "a key of 2^62": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(50),
        }.items()
    ),
    Bad("GGUF: a folder", folder_in_place("model.gguf"), ("estimate model.gguf",)),
    Bad("GGUF: a pipe", pipe_in_place("model.gguf"), ("estimate model.gguf",)),
    Bad("GGUF: none", nothing, ("estimate model.gguf", "eval model.gguf --text text.txt")),
]

TOKENIZERS = [
    *(
        Bad(f"tokenizer.json: {name}", raw("model/tokenizer.json", content), SPEAKING)
        for name, content in NOT_JSON.items()
        if name != "huge number"
    ),
    Bad(
        "tokenizer.json: unknown model",
        edited("model/tokenizer.json", lambda each: each["model"].update(type="X")),
        SPEAKING,
    ),
    Bad(
        "tokenizer.json: vocabulary of numbers",
        edited("model/tokenizer.json", lambda each: each["model"].update(vocab=[1, 2])),
        SPEAKING,
    ),
    Bad(
        "tokenizer.json: negative ids",
        edited("model/tokenizer.json", lambda each: each["model"]["vocab"].update(a=-5)),
        SPEAKING,
    ),
    Bad(
        "tokenizer.json: ids beyond the embedding",
        edited(
            "model/tokenizer.json",
            lambda each: each["model"].update(
                vocab={key: value + 5000 for key, value in each["model"]["vocab"].items()}
            ),
        ),
        READING_TEXT,
    ),
    Bad("tokenizer.json: a folder", folder_in_place("model/tokenizer.json"), SPEAKING),
    Bad(
        "tokenizer: none",
        without("model/tokenizer.json", "model/tokenizer_config.json"),
        SPEAKING,
    ),
    *(
        Bad(f"tokenizer_config.json: {name}", raw("model/tokenizer_config.json", content), SPEAKING)
        for name, content in NOT_JSON.items()
        if name not in ("huge number", "Latin-1")
    ),
    Bad(
        "tokenizer_config.json: a class of a number",
        edited("model/tokenizer_config.json", lambda each: each.update(tokenizer_class=5)),
        SPEAKING,
    ),
]


def text(name: str, content: bytes) -> tuple[str, Make]:
    return name, raw(name, content)


_WORDS = b"the cat sat on a mat and the dog ran " * 400
_TEXTS = {
    "missing": ("no.txt", nothing),
    "a folder of nothing": ("empty", folder_in_place("empty")),
    "a pipe": ("pipe.txt", pipe_in_place("pipe.txt")),
    "a link to nothing": ("link.txt", link_in_place("link.txt", "no")),
    "a link to itself": ("loop.txt", link_in_place("loop.txt", "loop.txt")),
    "a name of 300 letters": ("a" * 300 + ".txt", nothing),
    "below a file": ("text.txt/x.txt", nothing),
    "empty": text("bad.txt", b""),
    "too short": text("bad.txt", b"one"),
    "binary": text("bad.txt", bytes(range(256)) * 100),
    "UTF-16": text("bad.txt", _WORDS.decode().encode("utf-16")),
    "Latin-1": text("bad.txt", "é ".encode("latin-1") * 1000),
    "no gzip": text("bad.txt.gz", _WORDS),
    "half a gzip": text("bad.txt.gz", gzip.compress(os.urandom(9999))[:5000]),
    "damaged gzip": text(
        "bad.txt.gz", gzip.compress(_WORDS)[:40] + b"x" * 20 + gzip.compress(_WORDS)[60:]
    ),
    "lines of no JSON": text("bad.jsonl", b"x\n" * 100),
    "lines of lists": text("bad.jsonl", b"[]\n" * 100),
    "lines without text": text("bad.jsonl", b'{"a": 1}\n' * 100),
    "lines of numbers": text("bad.jsonl", b'{"text": 5}\n' * 100),
    "lines of null": text("bad.jsonl", b'{"text": null}\n' * 100),
    "a nested line": text("bad.jsonl", b'{"text": ' + DEEP + b"\n"),
    "a huge number": text("bad.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n"),
    "half a character": text("bad.jsonl", b'{"text": "\\ud800' + _WORDS + b'"}\n'),
    "half a line": text("bad.jsonl", b'{"text": "' + _WORDS),
    "unknown suffix": text("bad.csv", _WORDS),
}
TEXTS = [
    Bad(
        f"text: {name}",
        make,
        (
            f"prune model -o out --calibration {place} --samples 4 --length 16",
            f"shrink model -o out --calibration {place} --samples 4 --length 16",
            f"eval model --text {place} --window 16",
            f"train model -o out --data {place} --tokens 256 --length 16 --batch-tokens 64",
            f"recover model --teacher dense -o out --data {place} --tokens 256 --length 16",
        ),
    )
    for name, (place, make) in _TEXTS.items()
]

_YAML = {
    "missing": nothing,
    "a folder": folder_in_place("bad.yaml"),
    "a pipe": pipe_in_place("bad.yaml"),
    "a link to itself": link_in_place("bad.yaml", "bad.yaml"),
    "100 MB": large("bad.yaml"),
    **{
        name: raw("bad.yaml", content)
        for name, content in {
            "empty": b"",
            "a list": b"- a",
            "a word": b"word",
            "binary": bytes(range(256)),
            "UTF-16": "pattern: 0.5\n".encode("utf-16"),
            "a huge number": b"seed: " + b"9" * 5000,
            "nested": DEEP,
            "nested blocks": b"- " * 50_000,
            "itself": b"a: &a [*a]",
            "laughs": b"\n".join(
                b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1) if i else b"x"] * 9))
                for i in range(20)
            ),
            "code": b"a: !!python/object/apply:os.system [touch ran]",
            "a key twice": b"seed: 1\nseed: 2",
            "an unhashable key": b"? [a]\n: b",
            "no such day": b"seed: 2024-99-99",
            "an unknown key": b"no-such-key: 1",
            "a key of numbers": b"1: 2",
            "a long key": b"? " + b"x" * 1000 + b"\n: 1",
            "bad indentation": b"a: 1\n  b: 2",
            "a device of null": b"device: null",
            "a dtype of a list": b"dtype: [float32]",
        }.items()
    },
}
_RECIPES = {
    "a pattern of null": b"pattern: null",
    "a pattern of sixty": b"pattern: 2:4",
    "a pattern of NaN": b"pattern: .nan",
    "a pattern of a list": b"pattern: [1]",
    "no stages": b"stages: []",
    "stages of null": b"stages: null",
    "a stage of null": b"stages: [null]",
    "a stage without a method": b"stages: [{a: 1}]",
    "a method of a list": b"stages: [{method: [wanda]}]",
    "an unknown method": b"stages: [{method: nope}]",
    "an unknown stage key": b"stages: [{method: wanda, x: 1}]",
    "a thousand stages": b"stages: [" + b"{method: wanda}," * 1000 + b"]",
    "a damping of infinity": b"stages: [{method: sparsegpt, damping: .inf}]",
    "a damping of yes": b"stages: [{method: sparsegpt, damping: yes}]",
    "a group of 10^30": b"stages: [{method: wanda}, {method: quantize, group: 1%s}]" % (b"0" * 30),
    "an allocation of a number": b"allocation: 5",
    "an unknown allocation": b"allocation: {method: nope}",
    "sequences without bound": b"allocation: {method: owl, sequences: 1000000000000}",
    "a plan that is missing": b"allocation: {method: plan, file: no.json}",
    "a calibration of a list": b"calibration: [1]",
    "samples of 10^12": b"calibration: {samples: 1000000000000}",
    "samples of yes": b"calibration: {samples: yes}",
    "a seed of 2^64": b"calibration: {seed: 18446744073709551616}",
    "a length of -1": b"calibration: {length: -1}",
    "a mix of nothing": b"calibration: {source: {}}",
    "a mix of infinity": b"calibration: {source: {a: .inf}}",
    "held out 10^12": b"held_out: 1000000000000",
    "batches of 0": b"batch_tokens: 0",
    "memory of NaN": b"activation_memory: .nan",
    "an unknown format": b"format: nope",
}
OPTIONS = [
    *(Bad(f"recipe: {name}", make, RECIPE, "--recipe bad.yaml") for name, make in _YAML.items()),
    *(
        Bad(f"options: {name}", make, ("shrink", "train", "recover"), "--options bad.yaml")
        for name, make in _YAML.items()
    ),
    *(
        Bad(f"recipe: {name}", raw("bad.yaml", content), RECIPE, "--recipe bad.yaml")
        for name, content in _RECIPES.items()
    ),
    *(
        Bad(
            f"comparison: {name}",
            lambda folder, make=make: _as_comparison(folder, make),
            ("compare",),
        )
        for name, make in _YAML.items()
    ),
    *(
        Bad(f"comparison: {name}", raw("comparison.yaml", content), ("compare",))
        for name, content in {
            "no rows": b"model: model\nevaluation: {text: text.txt, window: 16}\nrows: {}",
            "rows of a list": b"model: model\nevaluation: {text: text.txt}\nrows: [a]",
            "a row of null": b"model: model\nevaluation: {text: text.txt}\nrows: {a: null}",
            "a row named dense": b"model: model\nevaluation: {text: text.txt}\nrows: {dense: {}}",
            "no text": b"model: model\nevaluation: {}\nrows: {a: {}}",
            "no model": b"model: nowhere\nevaluation: {text: text.txt}\nrows: {a: {}}",
            "a window of 10^12": b"model: model\nevaluation: {text: text.txt, window: "
            b"1000000000000}\nrows: {a: {}}",
            "repeats of 10^12": b"model: model\nevaluation: {text: text.txt}\nrepeats: "
            b"1000000000000\nrows: {a: {}}",
            "an unknown command": b"model: model\nevaluation: {text: text.txt}\nrows: {a: "
            b"{command: nope}}",
            "a row from nowhere": b"model: model\nevaluation: {text: text.txt, window: 16}\n"
            b"rows: {a: {from: b}}",
        }.items()
    ),
]


def _as_comparison(folder: Path, make: Make) -> None:
    make(folder)
    bad = folder / "bad.yaml"
    if bad.exists() or bad.is_symlink():
        bad.rename(folder / "comparison.yaml")


_LINEAR = "model.layers.0.mlp.up_proj"


def plan_of(change: Callable[[Any], object]) -> Make:
    def make(folder: Path) -> None:
        (folder / "plan.json").write_bytes((folder / "good-plan.json").read_bytes())
        edited("plan.json", change)(folder)

    return make


PLANS = [
    Bad(f"plan: {name}", make, RECIPE, "--plan plan.json")
    for name, make in {
        "missing": nothing,
        "a folder": folder_in_place("plan.json"),
        "a pipe": pipe_in_place("plan.json"),
        "100 MB": large("plan.json", b"{"),
        **{f"{name}": raw("plan.json", content) for name, content in NOT_JSON.items()},
        "an unknown linear": plan_of(
            lambda each: each["linears"].update({"x[/bold]": {"weights": 1, "zeros": 0}})
        ),
        "a linear less": plan_of(lambda each: each["linears"].pop(_LINEAR)),
        "too many zeros": plan_of(lambda each: each["linears"][_LINEAR].update(zeros=10**9)),
        "negative zeros": plan_of(lambda each: each["linears"][_LINEAR].update(zeros=-1)),
        "zeros of yes": plan_of(lambda each: each["linears"][_LINEAR].update(zeros=True)),
        "zeros of a half": plan_of(lambda each: each["linears"][_LINEAR].update(zeros=0.5)),
        "zeros of 10^400": plan_of(lambda each: each["linears"][_LINEAR].update(zeros=10**400)),
        "a sum that is wrong": plan_of(lambda each: each.update(zeros=1)),
        "a pattern of null": plan_of(lambda each: each.update(pattern=None)),
        "linears of a list": plan_of(lambda each: each.update(linears=[])),
        "no linears": plan_of(lambda each: each.update(linears={})),
        "an unknown key": plan_of(lambda each: each.update(zeroes=1)),
    }.items()
]

_LONG = "a" * 300
FLAGS = [
    Bad(f"flags of {commands[0]}: {words}", nothing, commands, words)
    for commands, lines in {
        ("prune",): "--device cuda:99 | --device tpu | --device cuda:1000000000000000000000",
        ("prune", "plan", "estimate"): """
            --sparsity 1.0 | --sparsity -0.1 | --sparsity nan | --sparsity inf | --sparsity x
            --pattern 5:4 | --pattern 0:4 | --pattern 2:5 | --pattern 2:4:8 | --pattern x
            --pattern 1:1000000000000 | --pattern -1:4 | --pattern 2:4 --sparsity 0.5
            --samples 1000000000000 | --samples 0 | --samples -1 | --samples 3 | --samples x
            --length 1000000000000 | --length 1 | --length 65 | --length -1
            --seed 18446744073709551616 | --seed -1 | --seed 0.5
            --method nope | --method quantize | --method auto --no-refit | --rebuild wanda
            --quantize int5 | --quantize int4 --quantize-group 1000000000000000000000000000000
            --quantize int4 --quantize-group -1 | --quantize int4 --quantize-group 7
            --quantize-group 8 | --stage wanda:x | --stage refit
            --stage wanda --stage refit:damping=.nan | --stage wanda --stage refit:damping=-1
            --stage wanda --stage refit:iterations=1000000000000 | --stage wanda:[/]=1
            --stage wanda --stage refit:damping=[[[[[ | --stage wanda --method wanda
            --allocate nope | --allocate owl --plan x
            --dtype float16 | --format nope
            --recipe [/] | --plan [red]x | --nonsense | --sparsity
        """,
        ("shrink",): """
            --sparsity 0 | --sparsity 1 | --sparsity nan | --sub-models 1000000000 | --sub-models 7
            --grid 0 | --grid 1000000000000 | --step 0 | --step 0.05 | --masks 1000000000
            --preset nope | --preset paper --masks 1000000000 | --prior nope | --budget nope
            --uniform --padded | --curve --sparsity 0.5 | --seed 18446744073709551616
            --uniform --budget latency | --options [/]
        """,
        ("train",): """
            --tokens -5 | --tokens 0 | --tokens 1000000000000000000000 | --tokens 10 | --length 65
            --learning-rate nan | --learning-rate 0 | --learning-rate 1e300 | --top-k 0
            --top-k 1000000000000 | --low-rank 0 | --low-rank 1000000000000 | --pattern 5:4
            --preset nope | --batch-tokens 1 | --seed -1 | --log-to nope | --data text.txt:nan
            --teacher nowhere/at-all/x | --validation no.txt | --options [/]
        """,
        ("recover",): """
            --tokens -5 | --rank 0 | --rank 1000000000000 | --learning-rate inf | --network nope
            --network none --no-blocks | --top-k 0 | --length 65 | --batch-tokens 1 | --data no.txt
        """,
        ("eval",): """
            --window 1000000000000 | --window 1 | --window -1 | --window 65 | --max-windows 0
            --max-windows 1000000000000000000000 | --max-windows -1 | --tasks nope | --limit 0
            --dataset x --limit 1 | --against nowhere/at-all/x | --against text.txt
            --tasks arc_easy --task-data nowhere | --tasks arc_easy --limit -1
        """,
        ("simulate",): "--memory-traffic 0 | --memory-traffic -1",
        ("inspect",): "--nonsense | [/]",
    }.items()
    for words in (each.strip() for line in lines.splitlines() for each in line.split(" | "))
    if words
]

_NAMES = {
    "nowhere": "nowhere",
    "nobody's home": "~nosuchuser/model",
    "300 letters": _LONG,
    "markup": "[/]nowhere[red]",
    "an emoji": ":smile:",
    "control characters": "\x1b[2Jx\r",
    "half a character": "x\udc80",
    "below a file": "text.txt/model",
    "a text": "text.txt",
    "nothing": "",
    "a folder of nothing": "empty",
    "the root": "/",
    "a link to itself": "loop",
}


def _places(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("no")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "[").mkdir(exist_ok=True)
    (folder / "[/]taken").write_text("mine")
    os.mkfifo(folder / "pipe")


NAMES = [
    *(
        Bad(
            f"a model's name: {name}",
            _places,
            tuple(
                line.replace("MODEL", word or "''")
                for line in (
                    "plan MODEL -o out.json",
                    "estimate MODEL",
                    "prune MODEL -o out",
                    "shrink MODEL -o out",
                    "train MODEL -o out --data text.txt --tokens 256",
                    "recover MODEL -o out --teacher dense --data text.txt",
                    "recover dense -o out --teacher MODEL --data text.txt",
                    "eval MODEL --text text.txt",
                    "eval dense --against MODEL --text text.txt",
                    "inspect MODEL",
                    "simulate MODEL",
                    "report MODEL",
                )
            ),
        )
        for name, word in _NAMES.items()
    ),
    *(
        Bad(
            f"an output: {word[:20]}",
            _places,
            tuple(
                line.replace("OUT", word)
                for line in (
                    "prune model -o OUT --method magnitude --calibration text.txt --samples 4 "
                    "--length 16",
                    "shrink model -o OUT --calibration text.txt --samples 4 --length 16",
                    "train model -o OUT --data text.txt --tokens 256 --length 16 --batch-tokens 64",
                    "recover model -o OUT --teacher dense --data text.txt --length 16",
                )
            ),
        )
        for word in (
            "text.txt",
            "text.txt/x",
            "full",
            "model",
            "dense/../model",
            "model/below",
            ".",
            "dangling",
            "loop",
            "pipe",
            _LONG,
            "/proc/x",
            "/dev/null",
            "[/]taken",
            "~nosuchuser/x",
        )
    ),
    *(
        Bad(
            f"a file to write: {word[:20]}",
            _places,
            (
                f"plan model -o {word} --length 16",
                f"prune model -o out --method magnitude --calibration text.txt --samples 4 "
                f"--length 16 --save-recipe {word}",
            ),
        )
        for word in (
            "text.txt",
            "text.txt/x",
            "full",
            "full/mine.txt",
            "model/config.json",
            "model/new.json",
            "model/generation_config.json",
            "dangling",
            "loop",
            "pipe",
            f"{_LONG}.json",
            "/proc/x",
            "[/]taken",
            "~nosuchuser/x",
        )
    ),
]

EVERYTHING = [*CONFIGURATIONS, *WEIGHTS, *TOKENIZERS, *TEXTS, *OPTIONS, *PLANS, *FLAGS, *NAMES]
