"""A causal language model of a folder, by transformers (the `estimate` extra)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..io.header import quoted
from ..io.reader import Checkpoint
from ..io.tokenizer import has_tokenizer
from .samples import Drawn, Tokenize

# What a configuration calls the number of positions that a model has embeddings or was trained for.
_POSITIONS = ("max_position_embeddings", "n_positions")


def import_transformers() -> ModuleType:
    """transformers; InputError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "moments estimate runs the model by transformers: pip install 'ota-kernels[estimate]'"
        ) from error
    return transformers


def load_tokenizer(transformers: ModuleType, folder: Path) -> Tokenize:
    """Text -> ids, with the special tokens that the folder's tokenizer adds. InputError without one."""
    if not has_tokenizer(folder):
        raise InputError(f"{folder}: holds no tokenizer (tokenizer.json): copy the model's into it")
    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises whatever its many readers raise
            raise InputError(f"{folder}: transformers cannot load the tokenizer: {_line(error)}") from error
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


def load_config(transformers: ModuleType, folder: Path) -> Any:
    """The configuration of the text model in the folder. InputError where it cannot be read."""
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # as above
            raise InputError(f"{folder}: transformers cannot load config.json: {_line(error)}") from error
    return config.get_text_config()


def check_samples(config: Any, drawn: Drawn, folder: Path, data: Path) -> None:
    """InputError for a sample with ids or positions that the model does not have."""
    positions = next((getattr(config, name) for name in _POSITIONS if hasattr(config, name)), None)
    for sample in drawn.samples:
        where = f"{data}: line {sample.line}"
        if int(sample.ids.max()) >= config.vocab_size:
            raise InputError(
                f"{where}: the tokenizer gives id {sample.ids.max()}, but the model in {folder} has "
                f"{config.vocab_size} tokens: the tokenizer is another model's"
            )
        if positions is not None and len(sample.ids) > positions:
            raise InputError(
                f"{where} has {len(sample.ids)} tokens, but the model in {folder} has {positions} positions: "
                f"add --max-length {positions}"
            )


def load_model(transformers: ModuleType, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model in `dtype`, in evaluation mode (no dropout), on the CPU.

    Raises InputError where transformers cannot load it, weights are missing, or a parameter has no gradient.
    """
    with _quiet(transformers):
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # as above
            raise InputError(f"{folder}: transformers cannot load the model: {_line(error)}") from error
    if info["missing_keys"]:
        raise InputError(
            f"{folder}: its weights lack {quoted(sorted(info['missing_keys']))}, which the model needs"
        )
    for name, parameter in model.named_parameters():
        # Some models keep a few layers in float32 whatever was asked for.
        if parameter.dtype not in (dtype, torch.float32) or not parameter.requires_grad:
            raise InputError(
                f"{folder}: parameter {quoted(name)} is {parameter.dtype}, not trainable in {dtype}: "
                "estimate on weights that are not quantized"
            )
    return model.eval()


def named_as_stored(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Parameter]:
    """Each parameter once, by the name of its tensor in the checkpoint; tied ones have the first name found.

    Raises InputError for a parameter that no tensor of the checkpoint has the name and shape of: its
    curvature would fit nothing in a merge.
    """
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    stored = {}
    for parameter, names in aliases.items():
        name = next((name for name in names if name in checkpoint.tensors), None)
        if name is None or checkpoint.tensors[name].shape != tuple(parameter.shape):
            raise InputError(
                f"{checkpoint.label}: transformers makes parameter {quoted(names[0])}, of shape "
                f"{list(parameter.shape)}, from tensors of other names or shapes: its curvature would fit "
                "none of them"
            )
        stored[name] = parameter
    return stored


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without the bars and reports of transformers: what matters of them is in our errors."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


def _line(error: Exception) -> str:
    """The first sentence of what a library says, which may go on for paragraphs."""
    text = " ".join(str(error).split()).partition(". ")[0]
    return text[:160] or type(error).__name__
