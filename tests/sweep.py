"""Small instances of the model classes of the installed transformers, for the sweep over all of them."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MOST_PARAMETERS = 60_000_000

# One class of each kind that a model type has: language models, encoders, classifiers, vision, speech.
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)

# Sizes by the end of a key's name; what is not here keeps its default.
_SIZES = (
    (r"(num_key_value_heads|num_kv_heads|multi_query_group_num|num_attention_groups)", 2),
    (r"(num_attention_heads|num_heads|n_head|encoder_attention_heads|decoder_attention_heads|n_heads)", 4),
    (
        r"(num_hidden_layers|n_layer|n_layers|num_layers|encoder_layers|decoder_layers|num_decoder_layers|depth)",
        2,
    ),
    (r"(hidden_size|d_model|n_embd|embed_dim|dim|projection_dim|embedding_size|word_embed_proj_dim)", 32),
    (
        r"(intermediate_size|ffn_dim|encoder_ffn_dim|decoder_ffn_dim|d_ff|d_inner|n_inner|moe_intermediate_size)",
        48,
    ),
    (r"(shared_expert_intermediate_size|ffn_hidden_size|mlp_dim)", 48),
    (r"(head_dim|kv_channels|d_kv|attention_head_size|v_head_dim|qk_nope_head_dim|qk_rope_head_dim)", 8),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_k|top_k_experts)", 2),
    (r"(vocab_size|decoder_vocab_size|text_vocab_size)", 128),
    (
        r"(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len)",
        64,
    ),
    (r"(q_lora_rank|kv_lora_rank|time_step_rank)", 8),
    (r"(type_vocab_size)", 2),
    (r"(first_k_dense_replace)", 1),
)
_SIZES = tuple((re.compile(pattern), size) for pattern, size in _SIZES)
_TOKENS = re.compile(r".*_token_(id|index)|.*_token_index|.*_id")


@functools.cache
def classes() -> dict[str, tuple[type, type]]:
    """Class name -> (class, its configuration's class), of every model type."""
    found: dict[str, tuple[type, type]] = {}
    for mapping_name in _MAPPINGS:
        mapping = getattr(modeling_auto, mapping_name)
        for model_type in CONFIG_MAPPING:
            try:
                config = CONFIG_MAPPING[model_type]
                if config not in mapping:
                    continue
                model = mapping[config]
            except Exception:  # a module that needs a library that is not installed
                continue
            for one in model if isinstance(model, tuple | list) else [model]:
                if one is not None:
                    found.setdefault(one.__name__, (one, config))
    return found


def small_configs(config_class: type) -> Iterator[Any]:
    """Configurations to try, the smallest first: all sizes, or only layers and vocabulary."""
    for patterns in (_SIZES, _SIZES[2:3] + _SIZES[9:10]):
        try:
            config = config_class()
            _shrink(config, patterns)
        except Exception:
            continue
        yield config


def _shrink(config: Any, patterns) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value, patterns)
        elif type(value) is int:
            size = next((size for pattern, size in patterns if pattern.fullmatch(key)), None)
            if size is not None and size < value:
                setattr(config, key, size)
            elif _TOKENS.fullmatch(key) and value >= 128:
                setattr(config, key, 3)
    layers = getattr(config, "layer_types", None)
    if isinstance(layers, list) and isinstance(getattr(config, "num_hidden_layers", None), int):
        config.layer_types = layers[: config.num_hidden_layers]


def build(model_class: type, config_class: type) -> torch.nn.Module | None:
    """A small model with random weights; None where none can be built small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for config in small_configs(config_class):
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(config).parameters())
                if size > MOST_PARAMETERS:
                    continue
                torch.manual_seed(0)
                return model_class(config).eval()
            except Exception:
                continue
    return None
