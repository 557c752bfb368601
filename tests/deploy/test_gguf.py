"""GGUF files compute in llama.cpp what the checkpoint computes in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.models.headers import headers_of
from secateur.models.locate import find_folder
from secateur.models.reader import CheckpointReader
from secateur.pruning.recipe import Recipe
from secateur.shrinking.export import export as save_shrunk
from secateur.shrinking.layout import plan_layout
from secateur.shrinking.source import open_source
from secateur.shrinking.units import find_sub_blocks
from tiny import make_checkpoint

TEXT = "the cat sat on a mat, and the dog's 12 houses ran to the red sea by 2031:  don't go"
PROMPT = "the dog sat on 17 mats,  and don't"
ROWS = 320
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_hidden_layers": 4,
    "vocab_size": ROWS,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {
    "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7,
}  # fmt: skip
WINDOWS = {
    "layer_types": [f"{'full' if index in (0, 3) else 'sliding'}_attention" for index in range(7)],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {"num_attention_heads": 2, "head_dim": None}),
    "qwen3": ("qwen3", {"rope_parameters": YARN}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3 of other windows": ("gemma3_text", {**GEMMA, **WINDOWS}),
}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(cuts: list[Any], **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens(["<word>"])
    return tokenizer


def on_characters(normalizer: Any = None, cut: Any = None) -> Tokenizer:
    """As Gemma's: spaces are characters, and unknown characters are bytes."""
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(special)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t"), ("s", "at"), ("▁", "sat")]
    for token in [*"▁adeghimnorst,'17", *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if cut:
        tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(special[:4])
    return tokenizer


def whole(cut: str) -> Any:
    return [
        pre_tokenizers.Split(Regex(cut), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
UNDERSCORES = normalizers.Replace(" ", "▁")
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level([GPT2]),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(True), GPT2]),
    "qwen2": lambda: byte_level(whole(SPLIT)),
    "llama-bpe": lambda: byte_level(
        whole(SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), ignore_merges=True
    ),
    "gemma": lambda: on_characters(UNDERSCORES, pre_tokenizers.Split(" ", "merged_with_previous")),
    "llama 2": lambda: on_characters(normalizers.Sequence([normalizers.Prepend("▁"), UNDERSCORES])),
    "metaspace": lambda: on_characters(
        cut=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    ),
}


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def make(folder: Path, family: str, **changes: Any) -> Path:
    make_checkpoint(family, folder, **{**SIZES, **changes})
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator) / 4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder, TOKENIZERS["smollm"]())
    return folder


def shrink_unevenly(dense: Path, folder: Path) -> Path:
    """Blocks without attention, without feed-forward, without both, and a whole one."""
    source = open_source(dense)
    sub_blocks = find_sub_blocks(source.blocks)
    channels = {"attention": (0, 1, 0, 2), "ffn": (64, 0, 0, 96)}
    kept = [torch.arange(channels[each.kind][each.block]) for each in sub_blocks]
    widths = [each.width_of(units) for each, units in zip(sub_blocks, kept, strict=True)]
    layout = plan_layout(source, sub_blocks, widths, "uneven")
    save_shrunk(source, sub_blocks, kept, layout, folder)
    return folder


def check_same(folder: Path, path: Path, limit: float, prompt: str = PROMPT) -> None:
    """Compare greedy tokens and all log probabilities, those behind a text first."""
    llama = pytest.importorskip("xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 128, 1, False, 0
    params.cpuparams.n_threads = 1
    server = llama.Server(params)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    ids = tokenizer(prompt)["input_ids"]
    # Nothing is said of a token that is half a character, so a whole one is drawn.
    fixed = {"n_predict": 1, "logit_bias": [[tokenizer.convert_tokens_to_ids("a"), 1000]]}
    for step in range(6):
        request = {**fixed, "prompt": ids if step else prompt, "n_probs": ROWS}
        answer = server.handle_completions(request)
        (said,) = answer["choices"][0]["logprobs"]["content"]
        with torch.no_grad():
            logp_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        found_V = torch.full((ROWS,), -torch.inf)
        for each in said["top_logprobs"]:
            found_V[each["id"]] = each["logprob"]
        assert (logp_V.exp() * (logp_V - found_V)).sum() < limit
        greedy = int(logp_V.argmax())
        assert found_V.argmax() == greedy or limit > 1e-3
        ids = [*ids, greedy]


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    folder = make(tmp_path / "model", family, **changes)
    result = secateur.export(folder, tmp_path / "out.gguf")
    assert result.architecture == {"gemma3_text": "gemma3", "mistral": "llama"}.get(family, family)
    assert result.bytes == (tmp_path / "out.gguf").stat().st_size
    check_same(folder, tmp_path / "out.gguf", 1e-3)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"rope_parameters": YARN}),
    ],
    ids=["llama3", "biases", "qwen2"],
)
def test_blocks_of_different_sizes(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 4, "head_dim": None, "hidden_size": 128}
    dense = make(tmp_path / "dense", family, **sizes, **changes)
    folder = shrink_unevenly(dense, tmp_path / "model")
    save_tokenizer(folder, TOKENIZERS["smollm"]())
    result = secateur.export(folder, tmp_path / "out.gguf", type="f32", trust_remote_code=True)
    assert result.architecture == "deci"
    check_same(folder, tmp_path / "out.gguf", 1e-3)


def test_blocks_of_different_sizes_are_refused_where_llama_cpp_has_none(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", "qwen3")
    folder = shrink_unevenly(dense, tmp_path / "model")
    save_tokenizer(folder, TOKENIZERS["smollm"]())
    with pytest.raises(secateur.SecateurError, match="--uniform"):
        secateur.export(folder, tmp_path / "out.gguf", trust_remote_code=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.mark.parametrize(("type", "limit"), [("f32", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_types(llama: Path, type: Any, limit: float, tmp_path: Path) -> None:
    secateur.export(llama, tmp_path / "out.gguf", type=type)
    kinds = {len(each.shape): each.tensor_type for each in
             gguf.GGUFReader(tmp_path / "out.gguf").tensors}  # fmt: skip
    assert kinds == {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType[type.upper()]}
    check_same(llama, tmp_path / "out.gguf", limit)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "llama"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    return make(folder, "llama", **sizes, num_hidden_layers=8)


@pytest.mark.parametrize(("type", "limit"), [("q4_k_m", 0.2), ("q5_k_m", 0.1), ("q6_k", 0.02)])
def test_types_of_llama_cpp(wide: Path, type: Any, limit: float, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    made = secateur.export(wide, tmp_path / "model.gguf", type=type)
    assert made.notes == []
    weights = AutoModelForCausalLM.from_pretrained(wide).state_dict()
    tensors = {each.name: each for each in gguf.GGUFReader(made.file).tensors}
    kinds = {name: each.tensor_type.name for name, each in tensors.items()}
    assert kinds["output.weight"] == "Q6_K"
    # The outer eighths, and every third block between them.
    six = [index for index in range(8) if kinds[f"blk.{index}.ffn_down.weight"] == "Q6_K"]
    assert six == ([0, 3, 6, 7] if type != "q6_k" else list(range(8)))
    assert kinds["blk.1.ffn_up.weight"] == ("Q6_K" if type == "q6_k" else type.upper()[:4])
    for name in ("ffn_up", "ffn_down"):
        tensor = tensors[f"blk.1.{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        dense = weights[f"model.layers.1.mlp.{name[4:]}_proj.weight"].numpy()
        assert ((values - dense) ** 2).mean() < limit**2 * (dense**2).mean()


def test_rows_that_are_stored_larger_are_counted(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    made = secateur.export(llama, tmp_path / "model.gguf", type="q4_k_m")
    assert "matrices have rows that are no multiple of 256" in made.notes[0]
    counted = [each.tensor_type.name for each in gguf.GGUFReader(made.file).tensors]
    assert f"{counted.count('Q5_0')} as q5_0" in made.notes[0]


def test_a_type_without_its_quantiser_is_refused(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.deploy.gguf.quantizer.find_spec", lambda name: None)
    with pytest.raises(secateur.SecateurError, match=r"secateur\[llama\]"):
        secateur.export(wide, tmp_path / "model.gguf", type="q4_k_m")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name: str, llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    save_tokenizer(folder, TOKENIZERS[name]())
    result = secateur.export(folder, tmp_path / "out.gguf")
    prompt = " the cat sat on 12345 mats,\n\n  </s>and <s> don't é☃ the sat"
    if name == "metaspace":
        assert ["behind special tokens" in note for note in result.notes] == [True]
        prompt = prompt.replace("</s>", "").replace("<s>", "").strip()
    else:
        assert result.notes == []
    check_same(folder, tmp_path / "out.gguf", 1e-3, prompt)


def test_a_window_in_every_block_limits_the_context(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "mistral", sliding_window=16)
    secateur.export(folder, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["llama.context_length"].contents() == 16
    assert fields["general.name"].contents() == "model"


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_template_and_special_tokens_are_those_of_the_tokenizer(
    llama: Path, tmp_path: Path
) -> None:
    folder = copied(llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    secateur.export(folder, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields

    def value(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    assert value("chat_template") == "{{ messages[0].content }}"
    assert [value(f"ggml.{kind}_token_id") for kind in ("padding", "bos", "eos")] == [0, 1, 2]
    assert not value("ggml.add_bos_token")
    types = value("ggml.token_type")
    names = value("ggml.tokens")
    assert types[1] == gguf.TokenType.CONTROL and names[-1] == f"[PAD{ROWS - 1}]"
    assert types[names.index("<word>")] == gguf.TokenType.USER_DEFINED


def test_other_families_are_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(secateur.SecateurError, match=r"of type gpt2; .*llama.*gemma3_text\."):
        secateur.export(checkpoints("gpt2"), tmp_path / "out.gguf")


def test_rows_that_a_type_does_not_hold_are_refused_before_work(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama", intermediate_size=41)
    with pytest.raises(
        secateur.SecateurError, match=r"blk\.0\.ffn_down\.weight have 41 .* f32, f16 or bf16\."
    ):
        secateur.export(folder, tmp_path / "out.gguf", type="q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_tokenizers_that_llama_cpp_does_not_know_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "model")
    save_tokenizer(folder, byte_level(whole(r"\w+")))
    with pytest.raises(secateur.SecateurError, match="cuts text in its own way"):
        secateur.export(folder, tmp_path / "out.gguf")
    with pytest.raises(secateur.SecateurError, match="in its own way"):
        save_tokenizer(folder, byte_level(whole(SPLIT), ignore_merges=True))
        secateur.export(folder, tmp_path / "out.gguf")


def test_scaled_positions_that_llama_cpp_does_not_know_are_refused(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = make(tmp_path / "model", "llama", rope_parameters=dynamic)
    with pytest.raises(secateur.SecateurError, match="RoPE of type dynamic"):
        secateur.export(folder, tmp_path / "out.gguf")


def test_values_beyond_a_type_leave_no_file(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = 1e6
    model.save_pretrained(folder)
    save_tokenizer(folder, TOKENIZERS["smollm"]())
    with pytest.raises(secateur.SecateurError, match=r"blk\.3\.ffn_down\.weight .* --type bf16"):
        secateur.export(folder, tmp_path / "out.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_command_says_what_it_wrote_and_overwrites_nothing(llama: Path, tmp_path: Path) -> None:
    words = ["export", str(llama), "--to", "gguf", "--output", str(tmp_path / "out.gguf"), "--json"]
    done = CliRunner().invoke(app, words)
    said = json.loads(done.stdout)
    assert (said["architecture"], said["type"]) == ("llama", "f16")
    with pytest.raises(secateur.SecateurError, match="is there already"):
        secateur.export(llama, tmp_path / "out.gguf")


def test_an_estimate_of_a_file_does_not_convert_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    secateur.export(llama, file, type="q8_0")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    recipe = Recipe.from_mapping({"calibration": {"samples": 8, "length": 32}})
    said = secateur.estimate(file, recipe)
    assert not (tmp_path / "cache").exists()
    with headers_of(file) as folder:
        described = CheckpointReader(folder)
        assert (folder / "model.safetensors").stat().st_blocks < 100
    converted = CheckpointReader(find_folder(file))
    assert (described.shapes, described.dtypes) == (converted.shapes, converted.dtypes)
    there = secateur.estimate(converted.folder, recipe)
    assert (said.weights, said.output_bytes) == (there.weights, there.output_bytes)
