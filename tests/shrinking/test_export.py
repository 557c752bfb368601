"""What is saved loads in a fresh process and computes what the masked model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, OPTConfig

from secateur.models.reader import CheckpointReader
from secateur.models.text_path import find_blocks
from secateur.runs.errors import SecateurError
from secateur.shrinking.export import check_saved, export
from secateur.shrinking.layout import plan_layout
from secateur.shrinking.options import Form
from secateur.shrinking.source import open_source
from secateur.shrinking.sub_models import masked
from secateur.shrinking.units import (
    SubBlock,
    Width,
    all_units,
    find_sub_blocks,
    kept_parameters,
)

# Configurations as these families write them, without keys that only others have.
PLAIN = {
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=260, n_positions=64),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=260,
        max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.15,
    ),
    "llama of 8 heads": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, vocab_size=260, initializer_range=0.15,
    ),
    "llama of 2 groups": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, vocab_size=260, initializer_range=0.15,
    ),
    "gemma of 1 group": GemmaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, vocab_size=260, initializer_range=0.15,
    ),
}  # fmt: skip
FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", *PLAIN,
]  # fmt: skip
MULTI_HEAD = ["gpt2", "opt", "gpt_neox"]
# Uniform widths are tried twice: with fewer groups, and with all of them but fewer query heads.
FORMS: dict[str, Form] = {
    "uneven": "uneven", "uniform": "uniform", "padded": "padded", "queries": "uniform",
}  # fmt: skip
# Zeros are put where units were in the same way for every family.
LEFT_OUT = {
    "padded": [each for each in FAMILIES if each not in ("llama", "phi3", "gpt2")],
    "queries": MULTI_HEAD,
    "uniform": ["gemma of 1 group"],
}
CASES = [
    (family, form) for family in FAMILIES for form in FORMS if family not in LEFT_OUT.get(form, [])
]
IDS = torch.arange(4, 28).view(1, 24)

_LOAD = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
results = {}
ids = torch.arange(4, 28).view(1, 24)
for name, (folder, trust) in json.load(open(sys.argv[1])).items():
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=trust
    ).eval()
    assert "secateur" not in sys.modules
    with torch.no_grad():
        results[f"{name} logits"] = model(ids).logits
    if trust:
        # What vLLM does: it takes the class, builds it on its own, and brings head and attention.
        base = AutoModel.from_pretrained(folder, dtype=torch.float64, trust_remote_code=True).eval()
        assert type(base).__name__.startswith("Shrunk") and type(base).is_backend_compatible()
        built = AutoModel.from_config(base.config, trust_remote_code=True)
        shapes = {key: value.shape for key, value in built.state_dict().items()}
        assert shapes == {key: value.shape for key, value in base.state_dict().items()}
        with torch.no_grad():
            hidden = base(ids).last_hidden_state
            results[f"{name} from base"] = model.get_output_embeddings()(hidden)
    for label, use_cache in (("cached", True), ("uncached", False)):
        results[f"{name} {label}"] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8,
            do_sample=False, use_cache=use_cache,
        )
save_file(results, sys.argv[2])
"""


@dataclass(frozen=True)
class Saved:
    folder: Path
    source: Path
    kept: list[Tensor]


def choose(family: str, form: str, source: Path) -> list[Tensor]:
    """What stays, in every way the form allows: in uneven ones whole sub-blocks go too."""
    opened = open_source(source)
    sub_blocks = find_sub_blocks(opened.blocks)
    generator = torch.Generator().manual_seed(len(family))
    kept = []
    for number, sub_block in enumerate(sub_blocks):
        queries = sub_block.heads_per_unit
        if FORMS[form] == "uniform":
            counts = {"ffn": 41, "attention": sub_block.units}
            if form == "queries":
                queries -= 1
            elif family not in MULTI_HEAD:
                counts["attention"] -= 1
            count = counts[sub_block.kind]
        else:
            shares = (0.0, 0.6, 0.5, 0.0, 1.0, 0.3)
            count = round(shares[number % 6] * sub_block.units)
            queries -= number == 4 and queries > 1
        units = torch.randperm(sub_block.units, generator=generator)[:count].sort().values
        if sub_block.kind == "attention" and queries < sub_block.heads_per_unit:
            # Another choice of query heads in each group.
            order = torch.rand(count, sub_block.heads_per_unit, generator=generator).argsort(1)
            units = units[:, None] * sub_block.heads_per_unit + order[:, :queries].sort(1).values
        kept.append(units)
    return kept


def widths_of(sub_blocks: list[SubBlock], kept: list[Tensor]) -> list[Width]:
    return [each.width_of(units) for each, units in zip(sub_blocks, kept, strict=True)]


@pytest.fixture(scope="module")
def saved(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Saved]:
    everything = {}
    for family in FAMILIES:
        if family in PLAIN:
            dense = tmp_path_factory.mktemp("plain") / "model"
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(PLAIN[family]).save_pretrained(dense)
        else:
            dense = checkpoints(family)
        for form in [form for each, form in CASES if each == family]:
            folder = tmp_path_factory.mktemp("shrunk") / "model"
            kept = choose(family, form, dense)
            source = open_source(dense)
            sub_blocks = find_sub_blocks(source.blocks)
            layout = plan_layout(source, sub_blocks, widths_of(sub_blocks, kept), FORMS[form])
            export(source, sub_blocks, kept, layout, folder)
            check_saved(source, layout, folder)
            everything[f"{family} {form}"] = Saved(folder, dense, kept)
    return everything


@pytest.fixture(scope="module")
def fresh(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits and texts of all of them, from a process that knows nothing of secateur."""
    folder = tmp_path_factory.mktemp("fresh")
    listed = {name: (str(each.folder), "uneven" in name) for name, each in saved.items()}
    (folder / "folders.json").write_text(json.dumps(listed))
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, folder / "folders.json", folder / "results.safetensors"],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "results.safetensors")


@pytest.mark.parametrize(("family", "form"), CASES)
def test_fresh_process_computes_the_masked_model(
    family: str, form: str, saved: dict[str, Saved], fresh: dict[str, Tensor]
) -> None:
    each = saved[f"{family} {form}"]
    model = AutoModelForCausalLM.from_pretrained(each.source, dtype=torch.float64).eval()
    blocks = find_blocks(model)
    with torch.no_grad(), masked(blocks, find_sub_blocks(blocks), each.kept):
        logits = model(IDS, use_cache=False).logits
        text = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8,
            do_sample=False, use_cache=False,
        )  # fmt: skip
    torch.testing.assert_close(fresh[f"{family} {form} logits"], logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(fresh[f"{family} {form} uncached"], text)
    assert torch.equal(fresh[f"{family} {form} cached"], text)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_the_model_without_its_head_is_the_same_network(
    family: str, fresh: dict[str, Tensor]
) -> None:
    # The logits of Gemma 2 go through a tanh behind the head.
    base, whole = (fresh[f"{family} uneven {name}"] for name in ("from base", "logits"))
    torch.testing.assert_close(base, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "form"), [case for case in CASES if case[1] != "padded"])
def test_files_hold_as_many_parameters_as_were_kept(
    family: str, form: str, saved: dict[str, Saved]
) -> None:
    each = saved[f"{family} {form}"]
    source = open_source(each.source)
    sub_blocks = find_sub_blocks(source.blocks)
    removed = kept_parameters(sub_blocks, all_units(sub_blocks)) - kept_parameters(
        sub_blocks, each.kept
    )

    def count(reader: CheckpointReader) -> int:
        return sum(torch.Size(shape).numel() for shape in reader.shapes.values())

    assert count(CheckpointReader(each.folder)) == count(source.reader) - removed


@pytest.mark.parametrize(("family", "form"), [case for case in CASES if case[1] != "uneven"])
def test_stock_forms_need_no_code(family: str, form: str, saved: dict[str, Saved]) -> None:
    folder = saved[f"{family} {form}"].folder
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_llama_with_heads_that_do_not_divide_is_saved_as_mistral(
    saved: dict[str, Saved],
) -> None:
    folder = saved["llama of 8 heads uniform"].folder
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"]) == ("mistral", 6)
    folder = saved["llama of 2 groups queries"].folder
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"]) == ("mistral", 6)
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 8)
    untouched = json.loads((saved["llama uniform"].folder / "config.json").read_text())
    assert (untouched["model_type"], untouched["num_attention_heads"]) == ("llama", 2)


def test_kept_indices_lie_beside_the_checkpoint(saved: dict[str, Saved]) -> None:
    each = saved["llama uneven"]
    beside = load_file(each.folder / "secateur" / "kept.safetensors")
    sub_blocks = find_sub_blocks(open_source(each.source).blocks)
    for sub_block, units in zip(sub_blocks, each.kept, strict=True):
        assert torch.equal(beside[sub_block.label], units)


def test_cache_holds_as_many_heads_as_were_kept(saved: dict[str, Saved]) -> None:
    each = saved["llama uneven"]
    model = AutoModelForCausalLM.from_pretrained(each.folder, trust_remote_code=True).eval()
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    for layer, units in zip(cache.layers, each.kept[::2], strict=True):
        assert layer.get_seq_length() == 24
        assert layer.keys.shape == ((1, len(units), 24, 8) if len(units) else (1, 1, 24, 1))


def test_kept_weights_are_those_of_the_dense_files_bit_by_bit(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(checkpoints("llama", torch.bfloat16))
    sub_blocks = find_sub_blocks(source.blocks)
    kept = [torch.arange(1, each.units, 2) for each in sub_blocks]
    layout = plan_layout(source, sub_blocks, widths_of(sub_blocks, kept), "uniform")
    export(source, sub_blocks, kept, layout, tmp_path)
    small, dense = CheckpointReader(tmp_path), source.reader
    assert small.dtypes == dense.dtypes
    read, whole = small.read(small.files), dense.read(dense.files)
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(read[down], whole[down][:, 1::2])
    keys = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(read[keys], whole[keys][8:])
    assert torch.equal(read["model.norm.weight"], whole["model.norm.weight"])


def test_loading_uneven_widths_leaves_the_family_alone(saved: dict[str, Saved]) -> None:
    AutoModelForCausalLM.from_pretrained(saved["llama uneven"].folder, trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(saved["llama uneven"].source)
    assert type(dense).__name__ == "LlamaForCausalLM"


def test_a_tensor_under_a_wrong_name_is_noticed(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(checkpoints("llama"))
    sub_blocks = find_sub_blocks(source.blocks)
    layout = plan_layout(source, sub_blocks, [each.whole for each in sub_blocks], "uneven")
    wrong = replace(layout, renamed={"lm_head.weight": "head.weight"})
    export(source, sub_blocks, all_units(sub_blocks), wrong, tmp_path)
    with pytest.raises(SecateurError, match="would not load whole"):
        check_saved(source, wrong, tmp_path)


def test_refitted_parameters_take_the_place_of_cut_ones(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(checkpoints("llama", torch.bfloat16))
    sub_blocks = find_sub_blocks(source.blocks)
    kept = [torch.arange(each.units // 2) for each in sub_blocks]
    layout = plan_layout(source, sub_blocks, widths_of(sub_blocks, kept), "uniform")
    down_OK = torch.randn(32, 32)
    export(
        source, sub_blocks, kept, layout, tmp_path,
        lambda index: {"mlp.down_proj.weight": down_OK} if index == 1 else {},
    )  # fmt: skip
    small = CheckpointReader(tmp_path)
    new, old = (f"model.layers.{index}.mlp.down_proj.weight" for index in (1, 2))
    read, dense = small.read([new, old]), source.reader.read([old])
    assert torch.equal(read[new], down_OK.bfloat16())
    assert torch.equal(read[old], dense[old][:, :32])


def test_uneven_widths_do_not_load_as_something_else(saved: dict[str, Saved]) -> None:
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(saved["llama uneven"].folder)


def test_a_shrunk_checkpoint_with_uneven_widths_is_not_shrunk_again(
    saved: dict[str, Saved],
) -> None:
    with pytest.raises(SecateurError, match="differ in width already"):
        open_source(saved["llama uneven"].folder, trust_remote_code=True)
