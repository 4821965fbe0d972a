"""mergekit's YAML schema, read into one frozen Recipe, in which everything is slices and all levels of
parameters are one. What is unknown or out of range raises RecipeError."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from . import methods
from .checkpoints import chosen, matched
from .checks import check
from .documents import load_documents
from .levels import TOP_KEYS, Level, Notes, combined, parse_level, place_of
from .parameters import DTYPE, TEXT, Kind, Parameter, parse_plain, show, suggest
from .recipe import ModelEntry, Module, Recipe, Slice
from .reference import Reference, parse_reference, resolve_path
from .vocabulary import Vocabulary, parse_source, parse_vocabulary

logger = logging.getLogger(__name__)

MAX_MODELS = 64

ONE_RUN = ("every", "last")  # keys that choose among a run's checkpoints

CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")

_IGNORED_TOP_KEYS = ("name",)
_FORMS = ("models", "slices", "modules")


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe. Relative paths in it start at the current folder, else at the recipe's own.

    RecipeError names the file, and the key and value that are wrong.
    """
    path = Path(path)
    try:
        documents = load_documents(path)
        if len(documents) > 1:
            raise RecipeError(f"holds {len(documents)} documents: give one merge, or use `ota-merge run`")
        return parse_recipe(documents[0], path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def parse_recipe(data: Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """Check a recipe that is a mapping already. folder: where relative paths may start, besides the current.

    RecipeError names the key and value that are wrong. What mergekit's recipes carry and their method does
    not read is one warning for each key.
    """
    notes = Notes()
    recipe = _Parser(_mapping(data, "the recipe"), folder, notes).recipe()
    for line in notes.lines():
        logger.warning("%s", line)
    return recipe


class _Parser:
    """One recipe's mapping, taken apart."""

    def __init__(self, data: Mapping[Any, Any], folder: Path | None, notes: Notes) -> None:
        self.data, self.folder, self.notes = data, folder, notes
        self._numbers: dict[tuple[Reference, Reference | None], int] = {}

    def recipe(self) -> Recipe:
        data = self.data
        for key in data:
            if key in _IGNORED_TOP_KEYS:
                self.notes.add(
                    f"`{key}` in {{}} is not used: the output folder names the merge", "the recipe"
                )
        _check_keys(data, (*TOP_KEYS, *_IGNORED_TOP_KEYS), "the recipe")
        if data.get("merge_method") is None:
            raise RecipeError(f"`merge_method` is missing: give one of {', '.join(methods.names())}")
        self.method = methods.get(_top_value(data, "merge_method", TEXT, None))
        self.base = None
        if data.get("base_model") is not None:
            self.base = parse_reference(data["base_model"], "`base_model`", self.folder)
        self.levels = [parse_level(data.get("parameters"), "parameters", self.method, self.notes)]
        recipe = Recipe(
            merge_method=self.method.name,
            modules=self._modules(),
            base=self.base,
            dtype=_top_value(data, "dtype", DTYPE, None),
            out_dtype=_top_value(data, "out_dtype", DTYPE, None),
            chat_template=_chat_template(data.get("chat_template")),
            vocabulary=self._vocabulary(),
        )
        check(recipe)
        return recipe

    def _vocabulary(self) -> Vocabulary | None:
        source, data = self.data.get("tokenizer_source"), self.data.get("tokenizer")
        if source is not None and data is not None:
            raise RecipeError("`tokenizer_source` and `tokenizer` exclude each other: keep one of them")
        if data is not None:
            return parse_vocabulary(data, self.folder)
        if source is None:
            return None
        return Vocabulary(parse_source(source, "`tokenizer_source`", self.folder))

    def _modules(self) -> tuple[Module, ...]:
        given = [key for key in _FORMS if self.data.get(key) is not None]
        if len(given) > 1:
            both = " and ".join(f"`{key}`" for key in given)
            raise RecipeError(f"{both} exclude each other: keep one of them")
        if given != ["modules"]:
            return (Module(None, self._parts(self.data, "", self.levels)),)
        modules = _mapping(self.data["modules"], "`modules`")
        if not modules:
            raise RecipeError("`modules` is empty: name the parts to merge, each with `slices` or `models`")
        return tuple(self._module(name, data) for name, data in modules.items())

    def _module(self, name: Any, data: Any) -> Module:
        if not isinstance(name, str) or not name.strip():
            raise RecipeError(f"`modules` names a part {show(name)}: it must be a name (text)")
        where = f"modules.{name}"
        data = _mapping(data, f"`{where}`")
        _check_keys(data, ("slices", "models", "parameters"), f"`{where}`")
        if data.get("slices") is not None and data.get("models") is not None:
            raise RecipeError(f"`models` and `slices` in `{where}` exclude each other: keep one of them")
        level = parse_level(data.get("parameters"), f"{where}.parameters", self.method, self.notes)
        return Module(name, self._parts(data, f"{where}.", [level, *self.levels]))

    def _parts(self, data: Mapping[Any, Any], prefix: str, levels: list[Level]) -> tuple[Slice, ...]:
        """The slices of a module, or the one that its `models` are. prefix: where its keys stand."""
        if data.get("slices") is None:
            return (self._models(data.get("models"), f"{prefix}models", levels),)
        slices = _list(data["slices"], f"{prefix}slices", "- sources: [...]")
        return tuple(self._slice(part, f"{prefix}slices[{i}]", levels) for i, part in enumerate(slices))

    def _models(self, data: Any, where: str, levels: list[Level]) -> Slice:
        if data is None:
            data = []
        if self.method.of_one_run:
            data = self._checkpoints(data, where, levels)
        models = _list(data, where, "- model: PATH", "list the models to merge, each as `- model: PATH`")
        entries = [self._source(m, f"{where}[{i}]", levels, self.base, False) for i, m in enumerate(models)]
        if self.base is None:
            return self._merged(entries, None, levels, where)
        if self.method.base != "ignored":
            # mergekit's recipes may list the base among the models; its task vector is zero.
            entries = [entry for entry in entries if not _is_base(entry, self.base)]
            if not entries and self.method.least > 0:
                raise RecipeError(
                    f"`{where}` lists only the base model {self.base.label!r}: add the models to merge into "
                    "it"
                )
            return self._merged(entries, ModelEntry(self.base, {}), levels, where)
        if not any(entry.reference.same_as(self.base) for entry in entries):
            entries += self._base_as_model(levels)
        return self._merged(entries, None, levels, where)

    def _checkpoints(self, data: Any, where: str, levels: list[Level]) -> Any:
        """What is listed of a run's checkpoints: a pattern's folders, `every` and `last` of them."""
        if isinstance(data, str):
            data = [{"model": path} for path in matched(data, self.folder)]
        if not isinstance(data, list | tuple):
            return data
        found = [next((level.values[k] for level in levels if k in level.values), None) for k in ONE_RUN]
        if found == [None, None]:
            return data
        for i, entry in enumerate(data):
            if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
                raise RecipeError(f"`{where}[{i}]` is {show(entry)}: it must be `- model: FOLDER`")
        return [data[i] for i in chosen([entry["model"] for entry in data], *found)]

    def _base_as_model(self, levels: list[Level]) -> list[ModelEntry]:
        """The base of a method that uses none is one more model, as in mergekit. There a method with weights
        needs one for it from the outer levels; without, it gives config and tokenizer only."""
        if "weight" in self.method.keys and not any("weight" in level.values for level in levels):
            self.notes.add(
                f"`{self.method.name}` takes no edits from a base: {{}} gives config and tokenizer; to merge "
                "it too, list it in `models`",
                "base_model",
            )
            return []
        return [
            ModelEntry(self.base, combined(self.method.own, levels, f"the base model {self.base.label!r}"))
        ]

    def _slice(self, data: Any, where: str, levels: list[Level]) -> Slice:
        data = _mapping(data, f"`{where}`")
        _check_keys(data, ("sources", "base_model", "parameters", "residual_weight"), f"`{where}`")
        if data.get("residual_weight") is not None:
            self.notes.add("`residual_weight` in {} is not used", where)
        base = self.base
        if data.get("base_model") is not None:
            base = parse_reference(data["base_model"], f"`base_model` in `{where}`", self.folder)
        level = parse_level(data.get("parameters"), f"{where}.parameters", self.method, self.notes)
        levels = [level, *levels]
        if "sources" not in data:
            raise RecipeError(f"`sources` is missing in `{where}`: list the models and their layers")
        sources = _list(data["sources"], f"{where}.sources", "- {model: PATH, layer_range: [FIRST, END]}")
        entries = []
        for i, source in enumerate(sources):
            entry = self._source(source, f"{where}.sources[{i}]", levels, base, True)
            if any(
                entry.origin == other.origin and entry.reference.same_as(other.reference) for other in entries
            ):
                raise RecipeError(f"`{where}.sources` has {entry.model!r} twice: a slice takes a model once")
            entries.append(entry)
        _check_lengths(entries, where)
        if base is None or self.method.base == "ignored":
            return self._merged(entries, None, levels, where)
        own = [entry for entry in entries if _is_base(entry, base)]
        if not own:
            raise RecipeError(
                f"the base model {base.label!r} is no source of `{where}`: add it there with its "
                "`layer_range`"
            )
        experts = [entry for entry in entries if entry is not own[0]]
        return self._merged(experts, ModelEntry(base, {}, layers=own[0].layers), levels, where)

    def _merged(
        self, entries: list[ModelEntry], base: ModelEntry | None, levels: list[Level], where: str
    ) -> Slice:
        if len(entries) > MAX_MODELS:
            raise RecipeError(
                f"`{where}` lists {len(entries)} models: at most {MAX_MODELS} can be merged at once"
            )
        self._check_count(len(entries), base is not None, where)
        entries = [
            ModelEntry(e.reference, e.parameters, self._number(e, i), e.layers, e.origin)
            for i, e in enumerate(entries)
        ]
        if len({entry.number for entry in entries}) < len(entries):
            raise RecipeError(f"`{where}` has a model twice: name each once")
        shared = combined(self.method.shared, levels, f"`{where}`")
        shared = {key: value for key, value in shared.items() if key not in ONE_RUN}  # they have been used
        if "weights_path" in shared:
            shared["weights_path"] = resolve_path(shared["weights_path"], self.folder)
        return Slice(tuple(entries), shared, base)

    def _check_count(self, count: int, has_base: bool, where: str) -> None:
        method = self.method
        if method.base == "required" and not has_base:
            raise RecipeError(f"`{method.name}` needs a `base_model`: add one")
        # One model can be grafted onto a base.
        least = 1 if has_base and method.base == "optional" and method.most is None else method.least
        if count >= least and (method.most is None or count <= method.most):
            return
        if least == 2 and method.most is None and not has_base:
            graft = "" if method.base == "ignored" else ", or a `base_model` to graft one model onto"
            raise RecipeError(f"a merge needs at least two models: add to `{where}`{graft}")
        wanted = f"{least} or more" if method.most is None else f"exactly {least}"
        beside = " beside the base" if has_base else ""
        raise RecipeError(
            f"`{method.name}` merges {wanted} model{'' if wanted == 'exactly 1' else 's'}{beside}, but "
            f"`{where}` "
            f"lists {count}"
        )

    def _number(self, entry: ModelEntry, place: int) -> int:
        """A model that stands in several slices keeps its number; in one list it may stand twice, as two."""
        if self.data.get("models") is not None:
            return place
        return self._numbers.setdefault((entry.reference, entry.origin), len(self._numbers))

    def _source(
        self, data: Any, where: str, levels: list[Level], base: Reference | None, ranged: bool
    ) -> ModelEntry:
        """One entry of `models` or `sources`. The parameters of a base are never read, so they may be
        anything."""
        data = _mapping(data, f"`{where}`")
        known = ("model", "origin", "layer_range", "parameters")
        _check_keys(data, known if ranged else [k for k in known if k != "layer_range"], f"`{where}`")
        if "model" not in data:
            raise RecipeError(f"`model` is missing in `{where}`: give a folder or a hub id")
        reference = parse_reference(data["model"], f"`model` in `{where}`", self.folder)
        layers = _layers(data, where) if ranged else None
        origin = self._origin(data, where, reference, base)
        if base is not None and self.method.base != "ignored" and reference.same_as(base) and origin is None:
            return ModelEntry(reference, {}, layers=layers)
        level = parse_level(
            data.get("parameters"), f"{where}.parameters", self.method, self.notes, of_model=True
        )
        values = combined(self._own([level, *levels]), [level, *levels], repr(reference.label))
        if isinstance(values.get("preconditioner_path"), str):
            values["preconditioner_path"] = resolve_path(values["preconditioner_path"], self.folder)
        return ModelEntry(reference, values, layers=layers, origin=origin)

    def _own(self, levels: list[Level]) -> tuple[Parameter, ...]:
        """The parameters of a model at these levels: without `weight` where a table has it."""
        if not any("weights_path" in level.values for level in levels):
            return self.method.own
        for level in levels:
            if "weight" in level.values:
                raise RecipeError(
                    f"`weight` in `{level.where}` and `weights_path` exclude each other: keep one of them"
                )
        return tuple(p for p in self.method.own if p.key != "weight")

    def _origin(
        self, data: Mapping[Any, Any], where: str, model: Reference, base: Reference | None
    ) -> Reference | None:
        """What the model's edit is counted from; None for the base."""
        if data.get("origin") is None:
            return None
        origin = parse_reference(data["origin"], f"`origin` in `{where}`", self.folder)
        if not self.method.edits or base is None:
            reason = "has no `base_model`" if self.method.edits else f"is merged by `{self.method.name}`"
            raise RecipeError(
                f"`origin` in `{where}` says where an edit starts that is added to a base, but the recipe "
                f"{reason}: {'add one' if self.method.edits else 'remove `origin`'}"
            )
        if origin.same_as(model):
            raise RecipeError(f"`origin` in `{where}` is the model itself, whose edit would be zero")
        return None if origin.same_as(base) else origin


def _is_base(entry: ModelEntry, base: Reference) -> bool:
    """Whether an entry is the base itself, whose edit is zero; with an origin it has one."""
    return entry.origin is None and entry.reference.same_as(base)


def _chat_template(value: Any) -> str | None:
    """`auto`, a known template's name, or the text of one."""
    if value is None:
        return None
    text = parse_plain(value, "`chat_template`", TEXT)
    if text in CHAT_TEMPLATES or (len(text) >= 20 and "{" in text):
        return text
    raise RecipeError(
        f"`chat_template` is {show(text)}: it must be {', '.join(CHAT_TEMPLATES)}, or a Jinja text; "
        f"{suggest(text, CHAT_TEMPLATES)}"
    )


def _layers(data: Mapping[Any, Any], where: str) -> tuple[int, int]:
    if data.get("layer_range") is None:
        raise RecipeError(f"`layer_range` is missing in `{where}`: give [first layer, end]")
    given = data["layer_range"]
    if (
        not isinstance(given, list | tuple)
        or len(given) != 2
        or not all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in given)
        or not 0 <= given[0] < given[1]
    ):
        raise RecipeError(
            f"`layer_range` in `{where}` is {show(given)}: it must be [first layer, end], two integers, 0 <= "
            "first < end"
        )
    return int(given[0]), int(given[1])


def _check_lengths(entries: list[ModelEntry], where: str) -> None:
    lengths = [entry.layers[1] - entry.layers[0] for entry in entries]
    if len(set(lengths)) > 1:
        listed = ", ".join(f"{e.model}: {n}" for e, n in zip(entries, lengths, strict=True))
        raise RecipeError(
            f"the sources of `{where}` have unlike numbers of layers ({listed}): make them equal"
        )


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} is {show(value)}: it must be a mapping of keys to values")
    return value


def _list(value: Any, where: str, of: str, advice: str = "") -> list | tuple:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"`{where}` is {show(value)}: it must be a list of `{of}`")
    if not value:
        raise RecipeError(f"`{where}` is missing or empty: {advice or f'give a list of `{of}`'}")
    return value


def _check_keys(data: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key, value in data.items():
        if key not in known:
            place = place_of(key, of_model=where != "the recipe") if isinstance(key, str) else None
            hint = place or suggest(key if isinstance(key, str) else "", known)
            raise RecipeError(f"unknown key {show(key)} (value {show(value)}) in {where}; {hint}")


def _top_value(data: Mapping[Any, Any], key: str, kind: Kind, default: Any) -> Any:
    """The value of a top-level key; absent or null gives the default."""
    value = data.get(key)
    return default if value is None else parse_plain(value, f"`{key}`", kind)
