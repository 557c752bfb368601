"""A tiny random model of any family that transformers knows, and what pruning makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import secateur
from secateur.models.experts import unstacked_experts
from secateur.models.structure import BlockList, find_linears
from secateur.models.text_path import find_blocks
from secateur.patterns.plan import Plan
from secateur.runs.errors import SecateurError
from secateur.shrinking.source import open_source
from secateur.shrinking.sub_models import check_cuttable
from secateur.shrinking.units import find_sub_blocks
from tiny import VOCABULARY, make_tokenizer

LAYERS = 4
IMAGES = " with images"

# Values of a configuration by name, taken where a family's own are larger.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim dim_model "
        "text_hidden_size out_hidden_size encoder_hidden_size embedding_dim lru_width emb_dim "
        "projection_dim projector_hidden_size vision_output_dim attention_hidden_size output_dim "
        "projector_input_dim projector_output_dim backbone_hidden_size input_embedding_size "
        "output_embedding_size patch_embed_hidden_size kv_channels image_text_hidden_size "
        "merged_hidden_size vision_hidden_size hidden_size_global router_hidden_size".split(),
        32,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head num_heads attention_heads n_heads encoder_attention_heads "
        "decoder_attention_heads linear_num_value_heads swa_num_attention_heads linear_num_heads "
        "resampler_n_heads num_decoder_attention_heads num_encoder_attention_heads "
        "num_sliding_attention_heads index_n_heads".split(),
        4,
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads "
        "num_query_groups".split(),
        2,
    ),
    **dict.fromkeys(
        "head_dim linear_key_head_dim linear_value_head_dim v_head_dim d_kv swa_head_dim "
        "attention_head_size dim_head qk_nope_head_dim kv_lora_rank q_lora_rank "
        "resampler_head_dim linear_head_dim query_pre_attn_scalar index_head_dim mamba_d_head "
        "mamba_headdim mamba_head_dim global_head_dim state_size ssm_state_size mamba_d_state "
        "hidden_size_per_layer_input laurel_rank d_rel o_lora_rank index_topk "
        "hc_lowrank gated_norm_rank adapter_rank".split(),
        8,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dff dim_ff mlp_dim "
        "ffn_hidden_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size "
        "feed_forward_size adapter_out_dim downsample_hidden_size alignment_intermediate_size "
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
        "original_max_position_embeddings max_target_positions share_expert_dim "
        "projection_intermediate_size num_position_embeddings".split(),
        64,
    ),
    **dict.fromkeys(
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size moe_hidden_size moe_shared_expert_intermediate_size "
        "mamba_d_ssm time_step_rank mamba_dt_rank".split(),
        32,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer num_layers encoder_layers decoder_layers depth n_layers "
        "num_blocks num_decoder_layers num_encoder_layers layers num_layers_per_stack".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "n_routed_experts num_local_experts num_experts moe_num_experts zero_expert_num".split(), 4
    ),
    **dict.fromkeys("num_experts_per_tok moe_topk num_experts_per_token moe_top_k".split(), 2),
    **dict.fromkeys("vocab_size unpadded_vocab_size decoder_vocab_size".split(), VOCABULARY),
    **dict.fromkeys("image_size resolution crop_size".split(), 28),
    "patch_size": 14,
    "qk_rope_head_dim": 8,
    "rotary_dim": 4,
    **dict.fromkeys("n_group num_expert_group num_group topk_group".split(), 1),
    "sliding_window": 8,
    "window_size": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "max_window_layers": 2,
    "first_k_dense_replace": 1,
    "kv_source_layers": 2,
    "num_kv_shared_layers": 2,
}
# They follow from the number of layers.
_DERIVED = frozenset(
    "layer_types mlp_layer_types layers_block_type no_rope_layers indexer_types qk_head_dim "
    "layer_rope_theta full_attn_idxs attention_layers activation_sparsity_pattern".split()
)
_OWN_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What cannot be built here, and what is missing.
_NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(["fast_vlm", "gemma3n", "perception_lm"], "its vision tower needs timm"),
    "evolla": "it reads proteins, and no auto class builds it",
    **dict.fromkeys(
        ["musicgen", "musicgen_melody"], "no auto class builds it from its own configuration"
    ),
    **dict.fromkeys(
        ["gemma4_assistant", "gemma4_unified_assistant"], "it drafts for another model"
    ),
    **dict.fromkeys(
        ["dots3_note", "dots3_note_text", f"dots3_note{IMAGES}"],
        "its configuration takes no tiny sizes",
    ),
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_WIDTH = {"head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_BY_KIND = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_SHARED = {"attention_hidden_size": 64, "attention_head_dim": 16}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_MAMBA = {"mamba_n_heads": 8}
_TEXT_SECTIONS: dict[str, Any] = {"text_config": {"rope_parameters": _SECTIONS}}
_PER_LAYER = {"hidden_size_per_layer_input": 0}

# What a family needs beside, nested as in its configuration.
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["bamba", "granitemoehybrid"], _MAMBA),
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"], _WIDTH),
    **dict.fromkeys(
        "cosmos3_edge glm46v glm4v glm_ocr glmga paddleocr_vl qwen2_5_vl qwen2_vl "
        "qwen2_5_omni_thinker qwen3_vl qwen3_vl_moe".split(),
        _TEXT_SECTIONS,
    ),
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE_BY_KIND}},
    "cohere_compass_text": {"rope_parameters": _ROPE_BY_KIND},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
            "num_experts_per_tok": 2,
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _SECTIONS, "moe_k": 2}},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "emu3": {
        "vocabulary_map": {"<image>": 250},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    },
    "falcon_h1": {"mamba_n_heads": 4},
    "chameleon": {"vocabulary_map": {"<image>": 250}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 16}},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {
        "intermediate_size": [64] * LAYERS,
        "vocab_size_per_layer_input": VOCABULARY,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4": {"text_config": {**_PER_LAYER, "vocab_size_per_layer_input": VOCABULARY}},
    "gemma4_text": {**_PER_LAYER, "vocab_size_per_layer_input": VOCABULARY},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granite4_vision": {
        "deepstack_layer_map": [],
        "downsample_rate": "1/2",
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": _SECTIONS}},
    "inkling_text": {"rel_extent": 4},
    "inkling_mm_model": {"text_config": {"rel_extent": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mistral4": {"head_dim": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local"] * LAYERS,
        "local_attn_chunk_length": 8,
    },
    "roc_bert": {"pronunciation_vocab_size": 100, "shape_vocab_size": 100},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, **_SHARED},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}


def every_family() -> list[str]:
    """Model types that transformers builds as causal language models, or with images.

    Where both are there and differ, the latter has ``IMAGES`` behind its name.
    """
    causal, images = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    both = [kind for kind in causal if kind in images and images[kind] != causal[kind]]
    return sorted({*causal, *images, *(kind + IMAGES for kind in both)})


def auto_class(family: str) -> Any:
    """The class of transformers that builds the family's models."""
    causal = not family.endswith(IMAGES) and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's configuration, as small as it gets."""
    family = family.removesuffix(IMAGES)
    kind = CONFIG_MAPPING[family]
    values = _shrunk(kind().to_dict(), count(VOCABULARY - 20))
    return kind(**_merged(values, _CHANGES.get(family, {})))


def _shrunk(own: dict[str, Any], tokens: Iterator[int]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = {"model_type": value["model_type"], **_shrunk(value, tokens)}
        elif name in _OWN_TOKENS:
            small[name] = _OWN_TOKENS[name]
        elif name.endswith(("token_id", "token_index")):
            if isinstance(value, int) and value >= VOCABULARY - 20:
                small[name] = next(tokens)
        elif type(value) is int and name in _SIZES and name not in _DERIVED:
            small[name] = min(value, _SIZES[name])
    if "kv_lora_rank" in own and "num_key_value_heads" in small:
        # Every head of latent attention has keys of its own.
        small["num_key_value_heads"] = _SIZES["num_attention_heads"]
    return small


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {**values}
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = (
            _merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
        )
        if value is ...:
            del merged[name]
    return merged


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the family."""
    config = tiny_config(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(family).from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "A_log" not in name:
                    parameter.normal_(0, 0.15)
                elif "norm" in name and "weight" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@dataclass(frozen=True)
class Trial:
    """What became of a family.

    Attributes:
        family: its model type.
        model: the class that was built.
        result: ``pruned``, ``refused`` or ``not tried``.
        why: the refusal, or what was missing to try.
        blocks: the list of blocks.
        experts: how experts are stored, empty without any.
        shrink: what of its blocks can be made smaller.
    """

    family: str
    model: str = ""
    result: str = "pruned"
    why: str = ""
    blocks: str = ""
    experts: str = ""
    shrink: str = ""


def try_family(family: str, text: Path, folder: Path) -> Trial:
    """Prune a tiny model of a family to half its weights, and check the result.

    Args:
        family: model type.
        text: for calibration and evaluation.
        folder: a new one for what is written.
    """
    if family in _NOT_TRIED:
        return Trial(family, result="not tried", why=_NOT_TRIED[family])
    dense = build(family).eval()
    name = type(dense).__name__
    source, output = folder / "dense", folder / "pruned"
    dense.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    recipe = secateur.Recipe.from_mapping(
        {
            "calibration": {"source": str(text), "samples": 8, "length": 32},
            "device": "cpu",
            "dtype": "float32",
        }
    )
    try:
        secateur.prune(source, recipe, output)
    except SecateurError as refusal:
        assert not output.exists(), f"refused after the folder was taken: {refusal}"
        return Trial(family, name, "refused", str(refusal).replace(str(source), "The checkpoint"))
    return _check(family, source, output, text)


def _check(family: str, source: Path, output: Path, text: Path) -> Trial:
    """Hold a pruned checkpoint against its dense one, as transformers loads both."""
    build_class = auto_class(family)
    dense, loading = build_class.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    dense.eval()
    if loading["missing_keys"]:
        return Trial(
            family, type(dense).__name__, "not tried", "transformers does not load what it saves"
        )
    pruned, loading = build_class.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert type(pruned) is type(dense)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    plan = Plan.from_file(output / "plan.json")
    blocks = find_blocks(pruned.eval())
    before = dict(dense.named_parameters())
    with unstacked_experts(pruned):
        zeros = {
            f"{blocks.name(index)}.{linear.name}": int((linear.weight_OI == 0).sum())
            for index, block in enumerate(blocks)
            for linear in find_linears(block)
        }
    assert zeros == plan.zeros
    inspection = secateur.inspect(output)
    assert inspection.zeros == sum(plan.zeros.values()), inspection
    assert inspection.weights == sum(plan.weights.values())
    for name, parameter in pruned.named_parameters():
        if not name.startswith(f"{blocks.prefix}."):
            assert torch.equal(parameter, before[name]), f"{name} is no block's, and changed"
    stacks = _stacks(find_blocks(dense))
    if stacks:
        _check_unstacked(dense)
    secateur.evaluate(
        output, text=text, window=32, max_windows=2, dtype="float32", device="cpu", against=source
    )
    return Trial(
        family,
        type(pruned).__name__,
        blocks=blocks.prefix,
        experts=", ".join(sorted({type(stack).__name__ for stack in stacks})),
        shrink=_shrinkable(source),
    )


def _check_unstacked(model: PreTrainedModel) -> None:
    """Compare results with experts as they are and as linears."""
    tokens = torch.arange(34, 66).view(2, 16)
    # Grouped kernels know no float64.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model.double()(input_ids=tokens, use_cache=False).logits
        with unstacked_experts(model):
            shown = model(input_ids=tokens, use_cache=False).logits
    # Some routers compute in fp32 whatever the model's dtype is.
    torch.testing.assert_close(shown, expected, rtol=1e-5, atol=1e-6)


def _stacks(blocks: BlockList) -> list[torch.nn.Module]:
    """The stacked experts of all blocks."""
    before = [module for block in blocks for module in block.modules()]
    with unstacked_experts(blocks.model):
        shown = {module for block in blocks for module in block.modules()}
    own = [module for module in before if module not in shown]
    return [module for module in own if module._parameters]


def _shrinkable(source: Path) -> str:
    for ffn_only, answer in ((False, "yes"), (True, "feed-forwards")):
        try:
            opened = open_source(source)
            parts = find_sub_blocks(opened.blocks, ffn_only=ffn_only)
            check_cuttable(opened.store(torch.device("cpu")), parts, queries=False)
        except SecateurError:
            continue
        return answer
    return "no"
