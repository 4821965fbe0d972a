"""The model's names for what a checkpoint names otherwise: one step behind all readers.

    names of the checkpoint
      --> without what wrappers put in             _orig_mod., _fsdp_wrapped_module., the adapter's .default.
      --> as one writer renames them all           as they are; as transformers saves; torchtitan
      --> one common prefix off or on              found from the names themselves
      --> the reading that covers most of the model, in names and shapes; two that cover as much are an error

A reading is arrangements by stored name (arrangement.py), so that it may also split and permute.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ...errors import InputError
from ...io.header import quoted
from ...io.reader import Checkpoint
from ..arrangement import Arrangement, arranged, whole
from ..source import Source
from .dialects import DIALECTS
from .transformers_layout import UnknownOrderError, build, stored_layout

Shape = tuple[int, ...]
Reading = dict[str, Arrangement]

_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module)\."
)
# PEFT keeps the adapter's name behind its matrices, and leaves it out in its files.
_ADAPTER = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(?!weight$)([^.]+)"
)
_PARALLEL = "module."  # DistributedDataParallel, in front of all names
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")
_BASE_LAYER = re.compile(r"\.base_layer\.")
_MOST_PREFIXES = 4


def rename(source: Source, model: Checkpoint | None) -> Source:
    """`source` under the model's names, without a model under names that no wrapper changed.

    Raises InputError where two readings of its names fit the model equally well.
    """
    shapes = {moment.name: moment.shape for moment in source.moments}
    known = (*shapes, *source.skipped, *source.aliases)
    plain = {name: unwrapped(name) for name in known}
    if model is None and all(name.startswith(_PARALLEL) for name in plain.values()):
        plain = {name: short.removeprefix(_PARALLEL) for name, short in plain.items()}
    twice, count = Counter(plain[m.name] for m in source.moments).most_common(1)[0] if shapes else ("", 1)
    if count > 1:
        raise InputError(f"{quoted(twice)} occurs twice: every parameter needs a name of its own")
    by_name = {plain[m.name]: replace(m, name=plain[m.name]) for m in source.moments}
    skipped = {plain[name]: why for name, why in source.skipped.items()}
    aliases = {plain[alias]: unwrapped(name) for alias, name in source.aliases.items()}
    if model is None:
        return replace(source, moments=tuple(by_name.values()), skipped=skipped, aliases={})
    reading, note = find_reading({name: moment.shape for name, moment in by_name.items()}, model)
    moments = {name: arranged(name, one, by_name) for name, one in reading.items()}
    prefixed = _prefix_of(reading)
    skipped = {_stored(name, prefixed, model): why for name, why in skipped.items()}
    for alias, name in aliases.items():
        alias, name = _stored(alias, prefixed, model), _stored(name, prefixed, model)
        if alias in model.tensors and alias not in moments and name in moments:
            moments[alias] = replace(moments[name], name=alias)
    notes = (*source.notes, note) if note else source.notes
    return replace(source, moments=tuple(moments.values()), skipped=skipped, aliases={}, notes=notes)


def unwrapped(name: str) -> str:
    """The name without what torch.compile, FSDP, activation checkpointing and PEFT put into it."""
    name = _WRAPPERS.sub("", name)
    name = _SAVED_MODULE.sub(".", _BASE_LAYER.sub(".", name))
    return _ADAPTER.sub(r".\1", name)


def stored_names(names: Iterable[str], model: Checkpoint) -> dict[str, tuple[str, ...]]:
    """The model's tensors that each parameter is stored in, as far as they are known."""
    names = list(names)
    plain = {name: unwrapped(name) for name in names}
    if all(stored in model.tensors for stored in plain.values()):
        return {name: (plain[name],) for name in names}
    shapes = {stored: _any_shape(stored, model) for stored in plain.values()}
    reading, _ = find_reading(shapes, model)
    stored: dict[str, list[str]] = {}
    for target, arrangement in reading.items():
        for one in arrangement.sources:
            stored.setdefault(one, []).append(target)
    return {name: tuple(stored.get(plain[name], (plain[name],))) for name in names}


def find_reading(shapes: Mapping[str, Shape], model: Checkpoint) -> tuple[Reading, str]:
    """The reading of all names that covers most of the model's tensors, and a note of what it assumes.

    Names that it does not know keep theirs. Raises InputError where two cover as much.
    """
    best: Reading = {name: whole(name, shape) for name, shape in shapes.items()}
    note, covered, rivals = "", _coverage(best, model), []
    for read, what in _writers(shapes, model):
        if covered >= min(len(shapes), _expected(model)):
            break
        for reading, prefix in _prefixed(read, model):
            found, said = _coverage(reading, model), " ".join(filter(None, (what, prefix)))
            if found > covered:
                best, note, covered, rivals = reading, said, found, []
            elif found == covered and note and said:
                rivals.append((reading, said))
    for rival, said in rivals:
        if _within(rival, model) != _within(best, model):
            raise InputError(
                f"its names are read in two ways that cover {covered} parameters of {model.root} each, "
                f"{note} and {said}: say by --prefix which is meant"
            )
    used = {source for arrangement in best.values() for source in arrangement.sources}
    kept = {n: whole(n, s) for n, s in shapes.items() if n not in used and n not in best}
    return best | kept, note and f"names were read {note}"


def _writers(shapes: Mapping[str, Shape], model: Checkpoint) -> Iterator[tuple[Reading, str]]:
    """The names as each writer would have them, the plain ones first; costly ones are made when asked for."""
    yield {name: whole(name, shape) for name, shape in shapes.items()}, ""
    saved = _as_transformers_saves(shapes, model)
    if saved:
        yield saved, "as transformers saves them"
    for dialect in DIALECTS:
        reading = dialect.arrangements(shapes, model)
        if reading:
            yield reading, f"from {dialect.name}"


def _as_transformers_saves(shapes: Mapping[str, Shape], model: Checkpoint) -> Reading:
    try:
        built = build(model)
        layout = stored_layout(built)
    except UnknownOrderError:
        return _experts_split(shapes)
    except Exception:  # what transformers makes of a model that it does not convert
        return _experts_split(shapes)
    own = {n: tuple(p.shape) for n, p in built.named_parameters()}
    prefix = _common(own, shapes)
    reading = {}
    for stored, arrangement in layout.items():
        parts = tuple(replace(part, source=prefix(part.source)) for part in arrangement.parts)
        if all(part.source in shapes for part in parts) and all(
            shapes[prefix(part.source)] == own[part.source] for part in arrangement.parts
        ):
            reading[stored] = replace(arrangement, parts=parts)
    return reading


def _common(own: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> Callable[[str], str]:
    """What must be put before the built model's names, or taken off, to have those of the checkpoint."""
    for prefix, _ in _counted(shapes, own):
        if any(f"{prefix}{name}" in shapes for name in own):
            return lambda name: f"{prefix}{name}"
    return lambda name: name


def _experts_split(shapes: Mapping[str, Shape]) -> Reading:
    """Fused experts as most models store them, where transformers cannot be asked: [experts, 2 I, H] is gate
    and up of each, [experts, H, I] is down."""
    from ..arrangement import Part

    reading: Reading = {}
    for name, shape in shapes.items():
        head, _, kind = name.rpartition(".")
        if not head.endswith(".experts") or len(shape) != 3 or kind not in ("gate_up_proj", "down_proj"):
            reading[name] = whole(name, shape)
            continue
        experts, m, n = shape
        stored = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        rows = m // len(stored)
        for expert in range(experts):
            for i, part in enumerate(stored):
                view = Part(name, (rows, n), (n, 1), (expert * m + i * rows) * n)
                reading[f"{head}.{expert}.{part}.weight"] = Arrangement((rows, n), (view,))
    return reading


def _prefixed(reading: Reading, model: Checkpoint) -> Iterator[tuple[Reading, str]]:
    """The reading as it is, and with one prefix off or on, as the names suggest."""
    yield reading, ""
    off = [prefix for prefix, _ in _counted(reading, model.tensors)]
    for prefix in ["", *off]:
        short = {name.removeprefix(prefix): one for name, one in reading.items()}
        if len(short) < len(reading):
            continue
        if prefix:
            yield short, f"without {quoted(prefix)}"
        for more, _ in _counted(model.tensors, short):
            longer = {n if n in model.tensors else f"{more}{n}" for n in short}
            if len(longer) == len(short):
                yield (
                    {n if n in model.tensors else f"{more}{n}": one for n, one in short.items()},
                    " ".join(
                        filter(None, (prefix and f"without {quoted(prefix)}", f"with {quoted(more)} before"))
                    ),
                )


def _counted(long: Iterable[str], short: Mapping[str, object]) -> list[tuple[str, int]]:
    """What stands most often before a name of `short` in the names of `long`."""
    counts: Counter[str] = Counter()
    for name in long:
        at = name.find(".")
        while at >= 0:
            if name[at + 1 :] in short:
                counts[name[: at + 1]] += 1
            at = name.find(".", at + 1)
    return counts.most_common(_MOST_PREFIXES)


def _coverage(reading: Reading, model: Checkpoint) -> int:
    """How many of the model's tensors it has, with their shapes."""
    return sum(
        name in model.tensors and model.tensors[name].shape == one.shape for name, one in reading.items()
    )


def _expected(model: Checkpoint) -> int:
    return sum(info.dtype.is_float for info in model.tensors.values())


def _within(reading: Reading, model: Checkpoint) -> Reading:
    """What of it the model has."""
    return {name: one for name, one in reading.items() if name in model.tensors}


@dataclass(frozen=True)
class _Prefix:
    """off, on: what the names of a reading lost and got in front."""

    off: str = ""
    on: str = ""


def _prefix_of(reading: Reading) -> _Prefix:
    for name, one in reading.items():
        source = one.parts[0].source
        if source != name and source.endswith(f".{name}"):
            return _Prefix(off=source.removesuffix(name))
        if source != name and name.endswith(f".{source}"):
            return _Prefix(on=name.removesuffix(source))
    return _Prefix()


def _stored(name: str, prefix: _Prefix, model: Checkpoint) -> str:
    """A name that no reading has, with the prefix that the others had; as it is where that fits nothing."""
    short = name.removeprefix(prefix.off)
    return next((n for n in (name, short, f"{prefix.on}{short}") if n in model.tensors), name)


def _any_shape(name: str, model: Checkpoint) -> Shape:
    info = model.tensors.get(name)
    return () if info is None else info.shape
