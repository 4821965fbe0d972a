"""What a folder holds, told by the names of its files before any tensor is read: its kind, its weights and
whether they are all there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

FILE_SUFFIX = ".safetensors"
TORCH_SUFFIX = ".bin"
_INDEX = ".index.json"
INDEX_SUFFIX, TORCH_INDEX_SUFFIX = FILE_SUFFIX + _INDEX, TORCH_SUFFIX + _INDEX

MODEL, ADAPTER, PIPELINE, STACK, OPTIMIZER, FOREIGN, EMPTY = (
    "model",
    "adapter",
    "diffusers pipeline",
    "sentence-transformers model",
    "optimizer states",
    "other format",
    "no weights",
)

EMBEDDINGS = "embeddings"  # of a prompt or of new tokens, in a file by themselves

# What transformers and diffusers write, and so what wins over other safetensors files of a folder.
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
# Where there are none of them: the same weights as torch.save wrote them, and what they are called as
# safetensors.
_TORCH_STEMS = {"pytorch_model": "model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
_TORCH_FILE = re.compile(rf"({'|'.join(_TORCH_STEMS)})[.-].*bin$")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{3,6})-of-(?P<count>\d{3,6})\.(?:safetensors|bin)")
# Beside a model's weights, not part of them; alone, they are what the folder is.
BESIDE = re.compile(
    r"adapter_model|pytorch_lora_weights|optimizer|scheduler|random_states|rng_state|training_args|exp_avg_sq"
)
_ADAPTER_FILE = re.compile(r"adapter_config\.json|(adapter_model|pytorch_lora_weights)\..+")
_OPTIMIZER_FILE = re.compile(
    r"optimizer(_\d+)?\.(pt|bin|safetensors)|.*_optim_states\.pt|.*\.distcp|global_step\d+|zero_to_fp32\.py"
)
_UNFINISHED = (
    ".part",
    ".partial",
    ".incomplete",
    ".crdownload",
    ".download",
    ".aria2",
    ".tmp",
    ".opdownload",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FORMATS = {
    ".gguf": "GGUF files (llama.cpp): give the safetensors model that they were made from",
    ".ggml": "GGML files (llama.cpp): give the safetensors model that they were made from",
    ".onnx": "ONNX files: give the safetensors model that they were exported from",
    ".h5": "Keras files: convert them to safetensors",
    ".keras": "Keras files: convert them to safetensors",
    ".msgpack": "Flax files: convert them to safetensors",
    ".npz": "NumPy archives: convert them to safetensors",
    ".tflite": "TensorFlow Lite files: give the safetensors model that they were made from",
    ".nemo": "NeMo archives: convert them to safetensors",
}
_TO_DO = {
    ADAPTER: "{kind}, not a full model: merge it into its base model first (PEFT's merge_and_unload) and "
    "give that folder; the means of A and of B are not the mean of B A",
    EMBEDDINGS: "{kind}, not a model: there is nothing of a network in it; give a full model",
    OPTIMIZER: "optimizer states, not a model: `ota-merge moments extract` reads them; give the folder of "
    "the weights here",
}


@dataclass(frozen=True)
class Contents:
    """What a folder is. kind: MODEL, ADAPTER, ...; named: the same in words; weights: an index or the weight
    files of a model, empty for other kinds; stem: what names of weight files begin with."""

    kind: str
    named: str
    weights: tuple[Path, ...] = ()
    stem: str = "model"


def where(label: str, path: Path | str) -> str:
    """What begins an error about `path`: the label too, where it says more than the path."""
    same = os.path.abspath(os.path.expanduser(label)) == os.path.abspath(path)
    return str(path) if same else f"{label}: {path}"


def contents_of(folder: Path, label: str) -> Contents:
    """What `folder` is. Raises InputError where its weights are incomplete or ambiguous."""
    names = _names(folder, label)
    if "model_index.json" in names:
        return Contents(PIPELINE, f"a {PIPELINE}")
    if "modules.json" in names:
        return Contents(STACK, f"a {STACK}", *_own_weights(folder, names, label))
    weights, stem = _own_weights(folder, names, label)
    only_beside = all(BESIDE.match(path.name) for path in weights)
    if weights and not only_beside:
        return Contents(MODEL, "a model", weights, stem)
    if any(_ADAPTER_FILE.fullmatch(name) for name in names):
        return Contents(ADAPTER, adapter_name(folder))
    if any(_OPTIMIZER_FILE.fullmatch(name) for name in names):
        return Contents(OPTIMIZER, OPTIMIZER)
    if weights:  # second moments by themselves, or weights of an unusual name
        return Contents(MODEL, "a model", weights, stem)
    return Contents(FOREIGN if _foreign(names) else EMPTY, _foreign(names) or EMPTY)


def adapter_name(folder: Path) -> str:
    """An adapter in words, as adapter_config.json calls it: "a LoRA adapter"."""
    names = {"LORA": "LoRA", "IA3": "IA3", "LOHA": "LoHa", "LOKR": "LoKr", "ADALORA": "AdaLoRA"}
    try:
        found = re.search(r'"peft_type"\s*:\s*"(\w+)"', (folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    kind = names.get(found[1], found[1]) if found else "LoRA"
    return f"{'an' if kind[0] in 'AI' else 'a'} {kind} adapter"


def check_is_model(path: Path, label: str) -> None:
    """InputError, by the kind's name and with what to do, where `path` is something else than a model."""
    if not os.path.isdir(path):
        return
    found = contents_of(path, label)
    if found.kind in _TO_DO:
        text = _TO_DO[found.kind].format(kind=found.named)
        raise InputError(f"{where(label, path)}: is {text}")


# What most tensors of a file that is no model are called, and what it then is.
_BY_NAMES = (
    ("a LoRA adapter", ADAPTER, r"(^|[._])(lora_(?!controlnet$)|dora_scale|alpha$)"),
    ("a LoHa or LoKr adapter", ADAPTER, r"(^|[._])(hada_w|lokr_w)"),
    ("an OFT adapter", ADAPTER, r"(^|[._])oft_"),
    ("an IA3 adapter", ADAPTER, r"(^|[._])ia3_l"),
    (OPTIMIZER, OPTIMIZER, r"\.exp_avg(_sq)?$"),
    ("the embeddings of a prompt", EMBEDDINGS, r"^(prompt_embeddings$|prompt_encoder\.)"),
    ("the embeddings of new tokens (textual inversion)", EMBEDDINGS, r"^(emb_params|clip_[lgh]|<.*>)$"),
)
_OTHERS = re.compile("|".join(pattern for _, _, pattern in _BY_NAMES))
_BY_NAMES = tuple((named, kind, re.compile(pattern)) for named, kind, pattern in _BY_NAMES)
_CONTROL_LORA = "lora_controlnet"  # a tensor that says what the file is


def kind_by_names(names: Iterable[str]) -> tuple[str, str] | None:
    """(what it is, its kind) where the names of a file's tensors say that it is no model, else None."""
    names = list(names)
    if _CONTROL_LORA in names:
        return "a LoRA adapter of a ControlNet", ADAPTER
    others, of_adapters = (
        list(filter(_OTHERS.search, names)),
        0,
    )  # large models have tens of thousands, and none
    for named, kind, pattern in _BY_NAMES:
        found = sum(pattern.search(name) is not None for name in others)
        of_adapters += found if kind == ADAPTER else 0
        if found > len(names) / 2 or (kind == ADAPTER and of_adapters > len(names) / 2):
            return named, kind
    return None


def refuse_kind(named: str, kind: str, label: str, path: Path) -> InputError:
    """The error about a file that is `named`, of a kind that is no model."""
    return InputError(f"{where(label, path)}: holds {_TO_DO[kind].format(kind=named)}")


def weight_files(folder: Path, label: str) -> list[Path]:
    """The index alone, or the weight files, of a folder; at least one.

    The names that transformers and diffusers write win; without one of them an index, then all safetensors
    files together; without any, `pytorch_model.bin` and its shards. Raises InputError where there are none,
    some are missing, or two sets lie side by side.
    """
    names = _names(folder, label)
    weights, _ = _own_weights(folder, names, label)
    if not weights:
        raise InputError(f"{where(label, folder)}: holds no {FILE_SUFFIX} file{_advice(folder, names)}")
    return list(weights)


def _names(folder: Path, label: str) -> list[str]:
    try:
        # Hidden files are the leavings of file managers and of unfinished downloads.
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"{where(label, folder)}: cannot be read: {error.strerror}") from error


def _own_weights(folder: Path, names: list[str], label: str) -> tuple[tuple[Path, ...], str]:
    """(index or files, stem) of the one set of weights of a folder; ((), "model") where there is none."""
    files = [name for name in names if name.endswith(FILE_SUFFIX)]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    for name in files:
        if f"{name}.aria2" in names:
            raise _incomplete(
                folder, label, f"{name}.aria2 says that the download of {name} was not finished"
            )
    for stem in _STEMS:
        chosen = _set_of_stem(folder, stem, FILE_SUFFIX, files, indexes, label)
        if chosen:
            return tuple(folder / name for name in chosen), stem
    if len(indexes) > 1:
        raise InputError(
            f"{where(label, folder)}: several indexes ({', '.join(indexes)}): name the one that is meant"
        )
    if indexes:
        return (folder / indexes[0],), indexes[0].removesuffix(INDEX_SUFFIX)
    own = [name for name in files if not BESIDE.match(name)]
    if not own:
        weights, stem = _torch_weights(folder, names, label)
        if weights:
            return weights, stem
        own = files
    stems = {match["stem"] for name in own if (match := _SHARD.fullmatch(name))}
    for stem in sorted(stems):
        _shards(folder, stem, FILE_SUFFIX, own, label)
    stem = own[0].removesuffix(FILE_SUFFIX) if len(own) == 1 and not stems else min(stems, default="model")
    return tuple(folder / name for name in own), stem


def _torch_weights(folder: Path, names: list[str], label: str) -> tuple[tuple[Path, ...], str]:
    """`_own_weights` of a folder without safetensors files."""
    files = [name for name in names if name.endswith(TORCH_SUFFIX)]
    indexes = [name for name in names if name.endswith(TORCH_INDEX_SUFFIX)]
    for stem, written in _TORCH_STEMS.items():
        chosen = _set_of_stem(folder, stem, TORCH_SUFFIX, files, indexes, label)
        if chosen:
            return tuple(folder / name for name in chosen), written
    return (), "model"


def _set_of_stem(
    folder: Path, stem: str, suffix: str, files: list[str], indexes: list[str], label: str
) -> list[str]:
    """The file names of the one set that is called `stem`: an index, a file, or all shards."""
    single, index = stem + suffix, stem + suffix + _INDEX
    shards = [name for name in files if (m := _SHARD.fullmatch(name)) and m["stem"] == stem]
    if single in files and (index in indexes or shards):
        other = index if index in indexes else shards[0]
        raise InputError(
            f"{where(label, folder)}: holds two sets of weights, {single} and {other}: remove the one that "
            "is not meant, or name the file that is"
        )
    if single in files:
        return [single]
    if index in indexes:
        return [index]
    return _shards(folder, stem, suffix, files, label)


def _shards(folder: Path, stem: str, suffix: str, files: list[str], label: str) -> list[str]:
    """The shards of a stem without an index, all there; empty where there are none."""
    found = [(name, m) for name in files if (m := _SHARD.fullmatch(name)) and m["stem"] == stem]
    if not found:
        return []
    counts = sorted({m["count"] for _, m in found})
    if len(counts) > 1:
        raise InputError(
            f"{where(label, folder)}: holds shards of two sets of weights, of {' and of '.join(counts)}, and "
            "no index: remove those that are not meant"
        )
    count, there = int(counts[0]), {int(m["number"]) for _, m in found}
    first = min(there | {1})  # numbers begin at 1, or at 0
    missing = [i for i in range(first, first + count) if i not in there]
    if missing:
        width = len(counts[0])
        listed = ", ".join(f"{stem}-{i:0{width}d}-of-{counts[0]}{suffix}" for i in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise _incomplete(
            folder, label, f"file names say {count} shards, {len(there)} are there; missing: {listed}{more}"
        )
    return [name for name, _ in found]


def _incomplete(folder: Path, label: str, what: str) -> InputError:
    return InputError(f"{where(label, folder)}: incomplete: {what}; fetch it again{unfinished(folder)}")


def unfinished(folder: Path) -> str:
    """What an error about missing weights adds where an unfinished download lies in the folder, else ""."""
    found = [name for name in _listed(folder) if name.endswith(_UNFINISHED) and not name.startswith(".")]
    hub = folder / ".cache" / "huggingface" / "download"
    found += [f".cache/huggingface/download/{name}" for name in _listed(hub) if name.endswith(".incomplete")]
    return f" ({found[0]} is of a download that was not finished)" if found else ""


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _advice(folder: Path, names: list[str]) -> str:
    """The end of the error about a folder without weights."""
    foreign = _foreign(names)
    if foreign:
        return f", only {foreign}"
    if unfinished(folder):
        return f"{unfinished(folder)}: fetch it again"
    inside = [name for name in names if holds_weights(folder / name)]
    return f"; its folders {', '.join(inside[:4])} do: name one" if inside else ""


def _foreign(names: list[str]) -> str:
    """Weights in other formats and what to do; "" where there are none."""
    for suffix, what in _FORMATS.items():
        if any(name.endswith(suffix) for name in names):
            return what
    pickles = [name for name in names if name.endswith(_PICKLES)]
    return f"{', '.join(pickles[:3])}: convert it to safetensors" if pickles else ""


def foreign_format(path: Path) -> str:
    """The end of the error about a file that is not safetensors."""
    found = _FORMATS.get(path.suffix)
    return f", but one of {found}" if found else "; convert it to safetensors"


def foreign_weights(folder: Path) -> str:
    """Weights of a folder in formats that are not read, and what to do; "" where there are none."""
    return _foreign(_listed(folder))


def holds_weights(path: Path) -> bool:
    """Whether a folder holds safetensors files, or the torch files of a model."""
    return path.is_dir() and any(
        name.endswith(FILE_SUFFIX) or _TORCH_FILE.match(name) for name in _listed(path)
    )
