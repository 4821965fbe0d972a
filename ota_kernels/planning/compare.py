"""Whether models of equal shapes compute the same thing: configurations, compared by what changes the
mathematics, and the written configuration against the written tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .roles import EMBEDDING, role_of

# Keys that change what the same tensors compute. What only generation, training or a limit of length reads
# (token ids, dropout, max_position_embeddings, sliding_window) may differ between fine-tunes of one model.
_KEYS = frozenset(
    re.findall(
        r"\w+",
        """
model_type hidden_size n_embd d_model num_hidden_layers n_layer num_layers encoder_layers decoder_layers
num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads num_key_value_heads
head_dim d_kv vocab_size type_vocab_size position_embedding_type layer_types no_rope_layers
num_experts num_local_experts n_routed_experts num_experts_per_tok moe_topk n_group topk_group topk_method
scoring_func norm_topk_prob routed_scaling_factor first_k_dense_replace moe_layer_freq decoder_sparse_step
qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank
state_size conv_kernel n_groups expand time_step_rank patch_size num_channels spatial_merge_size

hidden_act hidden_activation activation_function activation feed_forward_proj dense_act_fn mlp_activation
act_fn swiglu_limit swiglu_alpha hidden_act_param use_linear_projection only_cross_attention
attention_head_dim cross_attention_dim norm_num_groups class_embed_type addition_embed_type
prediction_type flip_sin_to_cos freq_shift time_embedding_type scaling_factor shift_factor
rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon
rope_theta rotary_emb_base rope_local_base_freq rope_scaling rotary_pct partial_rotary_factor rotary_dim
rope_interleave rope_interleaved alibi
attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar attention_multiplier scale_attn_weights
scale_attn_by_inverse_layer_idx attention_type
embedding_multiplier residual_multiplier logits_scaling logit_scale scale_emb scale_depth dim_model_base
scale_embedding use_parallel_residual parallel_attn new_decoder_architecture do_layer_norm_before
qk_layernorm use_qk_norm qk_norm apply_residual_connection_post_layernorm normalize_before
relative_attention_num_buckets relative_attention_max_distance
""",
    )
)
# What a vocabulary that is made of all models' changes, and what restacked layers change.
VOCABULARY = frozenset({"vocab_size"})
LAYERS = frozenset(
    {
        *("num_hidden_layers", "n_layer", "num_layers", "layer_types", "no_rope_layers", "moe_layer_freq"),
        *(
            "encoder_layers",
            "decoder_layers",
            "vision_config.num_hidden_layers",
            "audio_config.encoder_layers",
        ),
    }
)
# What only training, generation, a limit of length, or who wrote the file depends on.
_INERT = re.compile(
    r"token_id|token_index|drop|dtype|version|name|path|cache|commit|author|date|finetun|train|"
    r"init|loss|aux|gradient|checkpoint|max_|_max|length|n_ctx|n_positions|window|output_|return_|"
    r"problem_type|unsloth|license|tie_|^_(?!class)|seed|sample|temperature|top_[kp]$|num_beams|image_size"
)
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "language_model_config")
_SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_tanh": "gelu_new"}
# What transformers takes where the key is left out, by model_type.
_ROPE_THETA = dict.fromkeys(
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen2_moe",
        "gemma",
        "gemma2",
        "phi",
        "phi3",
        "stablelm",
        "gpt_neox",
        "olmo",
    ),
    1e4,
)
_ROPE_THETA["mixtral"] = 1e6
# These have rows for tokens of images or sound beyond `vocab_size`.
_MORE_ROWS = {"mllama", "mllama_text_model", "moshi", "kyutai_speech_to_text"}
_PLAIN_LABEL = re.compile(r"LABEL_\d+")
_LAYERS = re.compile(r"((?:[A-Za-z_]\w*\.)*(?:layers|layer|h|blocks|block))\.(\d+)\.")


def config_differences(
    configs: Mapping[str, Mapping[str, Any] | None], ignored: Collection[str] = ()
) -> list[str]:
    """What differs between the configurations (label -> config.json, None without one), by key and values;
    ignored: keys that may."""
    flat = {label: _flat(config) for label, config in configs.items() if config}
    found = []
    for key in sorted({key for values in flat.values() for key in values}):
        values = {label: values[key] for label, values in flat.items() if key in values}
        if key not in ignored and len({repr(value) for value in values.values()}) > 1:
            found.append(f"{key}: {_by_value(values)}")
    return found


def unknown_differences(configs: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """What differs in keys that are neither compared nor known to leave the mathematics alone: numbers,
    switches and words of the model and of its sections, where several configurations have them."""
    flat = {label: dict(_plain(config)) for label, config in configs.items() if config}
    found = []
    for key in sorted({key for values in flat.values() for key in values}):
        values = {label: values[key] for label, values in flat.items() if key in values}
        if len({repr(_value(value)) for value in values.values()}) > 1:
            found.append(f"{key}: {_by_value(values)}")
    return found


def _plain(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config") and key != "quantization_config":
            yield from _plain(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str) and key not in _KEYS and not _INERT.search(key):
            yield prefix + key, value


def _by_value(values: Mapping[str, Any]) -> str:
    """ "10000.0 in a, b, 1000000.0 in c"."""
    groups: dict[str, list[str]] = {}
    for label, value in values.items():
        groups.setdefault(_shown(value), []).append(label)
    return ", ".join(f"{value} in {' and '.join(labels)}" for value, labels in groups.items())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The compared keys in one form: nested ones as `section.key`, those of the language part without it."""
    own = {key: value for key, value in config.items() if key in _KEYS and value is not None}
    _unify_rope(own, config)
    if str(own.get("model_type")).startswith("gemma") and own.get("hidden_act") == "gelu":
        own["hidden_act"] = "gelu_pytorch_tanh"  # what was meant, and what transformers takes
    if own.get("num_attention_heads"):
        own.setdefault("num_key_value_heads", own["num_attention_heads"])
        if isinstance(own.get("hidden_size"), int) and isinstance(own["num_attention_heads"], int):
            own.setdefault("head_dim", own["hidden_size"] // own["num_attention_heads"])
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and not all(_PLAIN_LABEL.fullmatch(str(v)) for v in labels.values()):
        own["id2label"] = {str(key): value for key, value in labels.items()}
    flat = {prefix + key: _value(value) for key, value in own.items()}
    for key, section in config.items():
        if not isinstance(section, Mapping) or not key.endswith("_config"):
            continue
        if key in _TEXT_SECTIONS:
            inner = _flat(section, prefix)
            kind = inner.pop(f"{prefix}model_type", None)
            flat = inner | flat
            if kind is not None:
                flat[f"{prefix}text model_type"] = kind
        else:
            flat |= _flat(section, f"{prefix}{key}.")
    return flat


def _unify_rope(own: dict[str, Any], config: Mapping[str, Any]) -> None:
    """transformers 5 has `rope_parameters`, with a type for none and for some models an entry per type of
    layer, in place of `rope_theta`, `rope_local_base_freq`, `partial_rotary_factor` and `rope_scaling`."""
    scaling = own.pop("rope_scaling", None)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        scaling = parameters
    if isinstance(scaling, Mapping) and isinstance(scaling.get("full_attention"), Mapping):
        local = scaling.get("sliding_attention")
        if isinstance(local, Mapping) and "rope_theta" in local:
            own.setdefault("rope_local_base_freq", local["rope_theta"])
        scaling = scaling["full_attention"]
    if isinstance(scaling, Mapping):
        rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type") and v is not None}
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rest:
                own.setdefault(key, rest.pop(key))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        kind = "default" if kind == "mrope" else kind  # its sections say so
        if kind != "default" or "mrope_section" in rest:
            own["rope_scaling"] = {"rope_type": kind} | rest
    default = _ROPE_THETA.get(str(own.get("model_type")))
    if default is not None:
        own.setdefault("rope_theta", default)
    if "rope_theta" in own:
        own.setdefault("rope_scaling", "none")


def _value(value: Any) -> Any:
    """A value in the one form in which equal values have equal text: 10000 and 1e4 are the same."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return int(value) if float(value).is_integer() else float(value)
    if isinstance(value, str):
        return _SAME_ACTIVATION.get(value, value)
    if isinstance(value, Mapping):
        return {str(key): _value(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    return [_value(item) for item in value] if isinstance(value, list | tuple) else str(value)


def contradictions(config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Where a configuration contradicts the tensors (name -> shape) that it is written for: rows of the
    embeddings, layers that are not there."""
    if not config:
        return []
    flat, found = _flat(config), []
    size = flat.get("vocab_size")
    embeddings = vocabulary_rows(shapes)
    kinds = {str(flat.get("model_type")), str(flat.get("text model_type"))}
    if isinstance(size, int) and len(embeddings) == 1:
        ((name, rows),) = embeddings.items()
        if rows < size or (rows > size and not kinds & _MORE_ROWS):
            found.append(f"vocab_size is {size}, but {name} has {rows} rows")
    layers = _layer_count(shapes)
    asked = flat.get("num_hidden_layers", flat.get("n_layer"))
    if isinstance(asked, int) and layers is not None and layers < asked:
        found.append(f"there are to be {asked} layers, but the tensors are those of {layers}")
    return found


def vocabulary_rows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Rows of each input embedding outside of layers, by name."""
    known = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
    return {
        name: shape[0]
        for name, shape in shapes.items()
        if known.search(name) and role_of(name, shape) == EMBEDDING and not re.search(r"\.\d+\.", name)
    }


def _layer_count(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Layers of a model that has one stack of them; None otherwise."""
    stacks: dict[str, set[int]] = {}
    for name in shapes:
        found = _LAYERS.match(name)
        if found:
            stacks.setdefault(found[1], set()).add(int(found[2]))
    if len(stacks) != 1:
        return None
    (numbers,) = stacks.values()
    return len(numbers)
