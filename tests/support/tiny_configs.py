"""Tiny configs of any class of transformers: its defaults, with every size in it and in its parts made small."""

from __future__ import annotations

import inspect
import re
from typing import Any

from models import VOCABULARY
from transformers import PretrainedConfig

# What the numbers of a field are made, by the first pattern that fits its whole name.
SIZES: dict[str, int] = {
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id|decoder_start_token_id": 2,
    r"type_vocab_size": 2,
    r".*vocab_size.*|n_words|.*_group_vocab": VOCABULARY,
    r"index_topk": 64,  # none is left out: of scores that are zero alike, padding would decide
    r"(num_)?n?_?topk_group": 1,
    r"n_groups?|num_expert_group|moe_k|.*experts_per_tok(en)?|.*top_?k": 2,
    r".*(key_value|kv)_heads": 2,
    r".*_heads?": 4,
    r".*head_dim|d_kv|head_size|attention_head_size|rotary_dim|latent_query_num": 8,
    r".*moe_intermediate_size|.*expert_intermediate_size": 16,
    r".*intermediate_(size|dim)|.*ffn_dim|.*ffn_hidden_size|.*d?_?ff|n_inner|ffn_size|.*mlp_dim|mlp_width": 48,
    r".*hidden_size|.*d_model|n_embd|.*hidden_dim|.*embed_dim|.*embedding_(size|dim)|.*emb_dim": 32,
    r".*projection_(dim|size)|.*output_dim|.*query_dim|dim|upsample_groups": 32,
    r".*_layers|.*depths?|n_layer|.*num_blocks": 2,
    r".*(num_|n_)(local_|routed_)?experts|n_experts": 4,
    r".*image_size": 16,
    r".*patch_size": 4,
    r"n_filters|num_filters": 4,
    r"(mamba_)?chunk_size|.*state_size|.*d_state": 8,
    r".*lora_rank": 16,
    r"base_channels|upsample_initial_channel": 32,
    r"output_channels": 16,
}
# Sizes without which a model of the class cannot be built, though its config has none by default.
NEEDED = ("head_dim", "n_routed_experts", "num_experts_per_tok", "num_key_value_heads")

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_HALF_MROPE = {**_MROPE, "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]}}
_MIXED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
# What sizes alone do not make fit, by the class of the config.
SPECIAL: dict[str, dict[str, Any]] = {
    "ChameleonConfig": {"vocabulary_map": {"<image>": 5}},
    "Cosmos3EdgeTextConfig": _MROPE,
    "Emu3Config": {"vocabulary_map": {"<image>": 5}},
    "Gemma3nTextConfig": {
        **_MIXED,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma4TextConfig": {**_MIXED, "num_kv_shared_layers": 2},
    "Gemma4UnifiedTextConfig": {**_MIXED, "num_kv_shared_layers": 2},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "GlmImageTextConfig": _MROPE,
    "GlmOcrTextConfig": _MROPE,
    "Glm46VTextConfig": _MROPE,
    "Glm4vTextConfig": _MROPE,
    "Glm4vMoeTextConfig": _HALF_MROPE,
    "Kosmos2TextConfig": {"embed_dim": 32, "layers": 2, "attention_heads": 4},
    "Kosmos2Config": {"latent_query_num": 4},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "conv"]},
    "Mamba2Config": {"num_heads": 8},
    "MoonshineConfig": {"pad_token_id": 0},
    "PaddleOCRTextConfig": _MROPE,
    "Qwen2VLTextConfig": _MROPE,
    "Qwen2_5_VLTextConfig": _MROPE,
    "Qwen2_5OmniTextConfig": _MROPE,
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "XmodConfig": {"default_language": "en_XX"},
    "Dots1Config": {"n_shared_experts": 1},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid"]},
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def tiny_config(kind: type[PretrainedConfig], **special: Any) -> PretrainedConfig:
    """A config of this class.

    Args:
        kind: of a model, or of a part of one.
        special: what is to be as it is given; a dict for a part says the same of that.
    """
    special = {**SPECIAL.get(kind.__name__, {}), **special}
    names, parts, made = inspect.signature(kind).parameters, kind.sub_configs, {}
    default = kind() if parts else None
    for name, parameter in names.items():
        if name in parts:
            part = getattr(default, name, None)
            if isinstance(part, PretrainedConfig):
                made[name] = tiny_config(type(part), **special.get(name, {}))
        else:
            made |= _shrunk(name, parameter.default)
    if "kv_lora_rank" in names and "num_key_value_heads" in names:  # each head has keys of its own
        made["num_key_value_heads"] = made["num_attention_heads"]
    if "decoder_start_token_id" not in names and getattr(kind, "is_encoder_decoder", False):
        made["decoder_start_token_id"] = 2
    # eager experts, whose products are made in float64 too
    others = {name: value for name, value in special.items() if name not in parts}
    return kind(**{"experts_implementation": "eager", **made, **others})


def _shrunk(name: str, default: Any) -> dict[str, Any]:
    if re.search("drop|jitter", name) and isinstance(default, (int, float)) and not isinstance(default, bool):
        return {name: type(default)(0)}
    numbers = default if isinstance(default, (list, tuple)) else [default]
    if not numbers or any(type(n) is not int for n in numbers):
        numbers = []
        if name not in NEEDED or default is not None:
            return {}
    size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
    if size is None and re.fullmatch(r".*_token_(id|index)", name) and default >= VOCABULARY:
        size = 100 + sum(name.encode()) % 27
    if size is None:
        return {}
    return {name: type(default)(size for _ in numbers) if isinstance(default, (list, tuple)) else size}
