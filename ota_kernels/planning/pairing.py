"""Models, whether files or dictionaries, into output tensors: which tensor of each model an output is made
from, and by which settings. Reads headers, and what compressed curvature has beside its elements."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import InputError, RecipeError
from ..io.header import quoted
from ..io.ties import tie_in_config
from ..recipe.recipe import ModelEntry, Recipe, Slice
from ..recipe.reference import Reference
from ..recipe.settings import Settings
from ..tensors.curvature import Curvature, Uniform
from ..tensors.dtypes import OUTPUT_NAMES, DType
from . import buffers, tied
from .check import shape_advice
from .match import head_of, lacking_error, listing
from .models import Info, Model, Moments
from .naming import Named, Naming
from .outputs import AVERAGE, COPY, KEEP_BASE, MERGE, TAKE, OutputTensor, Part, with_origins
from .precision import Precision
from .prefixes import Renaming
from .resolve import Resolver, unused_filters
from .second_moments import curvature_of, moments_key
from .tables import check_rows

logger = logging.getLogger(__name__)


@dataclass
class Pairing:
    """The output tensors of a recipe.

    models: by their references; moments: of a recipe's entry, None without; allow_crimes: merge a tensor that
    some models lack by its method's rule, which is an error else; advice: the end of that error; renamed:
    models, by label, whose names differ from the first one's in a way that that error explains; files: models
    are files of any names, none of which is a layer's or tied to another: "same" where all must have them,
    "intersection" of those that all have, "union" of all; None: models of folders; table: of `weights_path`.

    outputs: in the order in which they are written, that of the first model where layers are not restacked;
    untied: the output has an output matrix of its own although some model ties it to the embeddings;
    left_out: stored tensors that are not written, with the reason; notes: what a user should know; donors: as
    in naming.py.
    """

    recipe: Recipe
    models: Mapping[Reference, Model]
    moments: Mapping[tuple[int, str], Moments]
    allow_crimes: bool = False
    advice: str = ""
    renamed: Mapping[str, Renaming] = field(default_factory=dict)
    files: str | None = None
    table: Mapping[str, Sequence[float]] | None = None
    outputs: list[OutputTensor] = field(init=False)
    untied: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.method = self.recipe.method
        self._resolvers: dict[int, Resolver] = {}
        self._settings: dict[tuple, Settings] = {}
        entries = (entry for part in self.recipe.slices for entry in part.experts)
        self._moments_of = {id(entry): self.moments.get(moments_key(entry)) for entry in entries}
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self._policy = self.recipe.parameters.get("extra_tensors", "error")
        if self.files == "intersection":
            self._policy = buffers.DROP
        self._precision = Precision(self.models.values(), self.recipe.dtype, self.recipe.out_dtype)
        naming = Naming(self.recipe, self.models, has_layers=self.files is None)
        self._models_of, self.donors = naming.models_of, naming.donors
        self._check_filters(naming.named)
        self.outputs = self._with_curvature(self._paired(self._matched(naming.named)))
        if naming.unnamed:
            self.left_out |= dict.fromkeys(naming.unnamed, "of no part that `modules` names")
            self.notes.append(f"left out, of no part that `modules` names: {listing(naming.unnamed)}")
        self.notes += self._precision.notes(listing)
        self._check_whole()
        check_rows(self.table, [*(output.name for output in self.outputs), *self.left_out])

    def _check_filters(self, named: Sequence[Named]) -> None:
        for line in unused_filters(self.recipe, (n for each in named for n in (each.name, *each.names))):
            logger.warning("%s", line)

    # Copies: output matrices that are tied to the embeddings, and aliases

    def _matched(self, named: Sequence[Named]) -> dict[str, tuple[Named, list[Part]]]:
        """The tensor of each model for every output tensor; without those that are copies of others."""
        pairs = {}
        for each in named:
            models = self._models_of(each.part)
            parts = list(map(Part, models, each.names))
            head = head_of(models, each.names) if self.files is None else None
            if head is not None:
                if all(head.tied):
                    self.left_out[each.name] = f"a copy of {head.sources[0]}, to which it is tied"
                    continue
                self.untied = (
                    self.untied or any(head.tied) or bool(head.untied) or self._donor_ties(each.name)
                )
                self.notes += [
                    f"{model.label}: config.json ties {each.name} to the embeddings, but its values are its "
                    "own: it is merged, and the output is not tied"
                    for model in head.untied
                ]
                parts = [
                    Part(p.model, source, p.name) if is_tied else p
                    for p, source, is_tied in zip(parts, head.sources, head.tied, strict=True)
                ]
            pairs[each.name] = (each, with_origins(each.part, parts))
        if len(self.recipe.slices) == 1 and self.recipe.slices[0].whole and self.files is None:
            self._leave_aliases(pairs)
        self.notes += [f"{name} is left out: {reason}" for name, reason in self.left_out.items()]
        return pairs

    def _leave_aliases(self, pairs: dict[str, tuple[Named, list[Part]]]) -> None:
        sources = {
            name: tuple(p.name if p.name in p.model.tensors else None for p in parts)
            for name, (_, parts) in pairs.items()
        }
        models = self._models_of(self.recipe.slices[0])[: len(self.recipe.slices[0].entries)]
        for name, source in tied.aliases(models, sources).items():
            self.left_out[name] = f"a copy of {source} in every model that stores it"
            del pairs[name]

    def _donor_ties(self, head: str) -> bool:
        """Whether the model that gives the configuration ties this output matrix to the embeddings."""
        donor = self.models.get(self.recipe.references[0])
        if donor is None or tie_in_config(donor.config, head) == tie_in_config(donor.config):
            return donor is not None and donor.tied_embeddings
        return bool(tie_in_config(donor.config, head))

    # Pairs

    def _paired(self, pairs: Mapping[str, tuple[Named, list[Part]]]) -> list[OutputTensor]:
        lacking: dict[str, list[str]] = {}
        reasons: dict[str, list[str]] = {}  # one note for all tensors of one reason
        outputs = []
        for name, (each, parts) in pairs.items():
            choice = self._choice(each, parts)
            if choice.reason:
                reasons.setdefault(choice.reason, []).append(name)
            if choice.action == buffers.DROP:
                self.left_out[name] = choice.reason
                continue
            if choice.action == buffers.MISSING:
                absent = [p.model.label for p in parts if p.name not in p.model.tensors]
                if len(absent) == len(parts) or not (self.allow_crimes or self.files == "union"):
                    lacking[name] = absent
            if not lacking:
                output = self._chosen(each, parts, choice)
                if output is not None:
                    outputs.append(output)
        if lacking:
            first = self._models_of(self.recipe.slices[0])[0].label
            raise lacking_error(lacking, self.renamed, first, self.advice)
        self.notes += [f"{reason}: {listing(names)}" for reason, names in reasons.items()]
        return outputs

    def _choice(self, named: Named, parts: Sequence[Part]) -> buffers.Choice:
        """What is written for a tensor, where it is a buffer or some models lack it."""
        if all(p.name in p.model.tensors for p in parts) and not buffers.may_be_buffer(named.name):
            return buffers.PLAIN
        if self.files == "union" and not all(p.name in p.model.tensors for p in parts):
            return buffers.Choice(buffers.MISSING)
        held = [buffers.held_of(p) if p.name in p.model.tensors else None for p in parts]
        return buffers.choose(named.name, held, self._policy, named.part.base is not None)

    def _chosen(self, named: Named, parts: list[Part], choice: buffers.Choice) -> OutputTensor | None:
        """The output tensor of a choice; None where it is left out."""
        if choice.action == buffers.MISSING:
            return self._optional(named, parts)
        if choice.action == buffers.TAKE:
            part = parts[choice.taken]
            info = part.info
            return OutputTensor(named.name, tuple(info.shape), info.dtype, TAKE, None, (part,), (), None)
        if choice.action == buffers.AVERAGE:
            there = tuple(p for p in parts if p.name in p.model.tensors)
            infos = [part.info for part in there]
            dtype = self._output_dtype(named.name, there, infos)
            return OutputTensor(named.name, tuple(infos[0].shape), dtype, AVERAGE, None, there, (), None)
        return self._output(named, parts, dtype=choice.dtype)

    def _optional(self, named: Named, parts: list[Part]) -> OutputTensor | None:
        """A tensor that some models lack, by its method's rule; None where it is left out."""
        has_base = named.part.base is not None
        found = [i for i, part in enumerate(parts) if part.name in part.model.tensors]
        base_there = has_base and found[0] == 0
        experts = [i - has_base for i in found if i >= has_base]
        rule = self.method.absent
        if len(found) == 1 and (rule == "only one" or base_there):
            return self._copied(named, parts[found[0]])
        if rule == "three" and len(found) < 3:
            logger.warning("%s is left out: fewer than three models have it", named.name)
            self.left_out[named.name] = "fewer than three models have it"
            return None
        if rule in ("only one", "base alone") or (has_base and not base_there):
            lacking = ", ".join(part.model.label for i, part in enumerate(parts) if i not in found)
            raise InputError(
                f"{lacking}: has no tensor {named.name}, without which `{self.method.name}` cannot merge it"
            )
        return self._output(named, parts, experts)

    def _copied(self, named: Named, part: Part) -> OutputTensor:
        """One tensor as it is, in the type of the output."""
        info = part.info
        dtype = self._output_dtype(named.name, [part], [info]) if info.dtype.is_float else info.dtype
        return OutputTensor(named.name, tuple(info.shape), dtype, COPY, None, (part,), (), None)

    def _output(
        self,
        named: Named,
        parts: list[Part],
        present: Sequence[int] | None = None,
        dtype: DType | None = None,
    ) -> OutputTensor:
        """present: the experts that have the tensor, None for all; dtype: of the output, None for what the
        recipe says."""
        has_base = named.part.base is not None
        entries = named.part.experts
        own = named.names[has_base : has_base + len(entries)]
        if present is not None:
            entries = [entries[i] for i in present]
            parts = parts[:has_base] + [parts[i + has_base] for i in present]
        infos = [part.info for part in parts]
        shape, stored = self._common(named.name, parts, infos)
        base, experts = (parts[0], tuple(parts[1:])) if has_base else (None, tuple(parts))
        if not experts:
            return self._copied(named, parts[0])
        positions = tuple(entry.number for entry in entries)
        if stored.bits:
            raise InputError(
                f"{parts[0].model.label}: {quoted(named.name)} is {stored.tag}, whose elements are parts of "
                "a byte: such a model cannot be merged; use the one that it was quantized from"
            )
        if not stored.is_float and self.method.of_one_run:
            return OutputTensor(named.name, shape, stored, TAKE, None, experts[-1:], (), None)
        if not stored.is_float:
            return OutputTensor(named.name, shape, stored, COPY, base, experts, positions, None)
        settings = self._resolver(named.part).settings(named.name, own, named.position, present)
        if self.method.copies(settings):
            return self._copied(named, experts[0])
        own = own if present is None else [own[i] for i in present]
        found = self._curvatures(named, entries, own, experts, shape)
        out = dtype or self._output_dtype(named.name, parts, infos)
        return OutputTensor(named.name, shape, out, MERGE, base, experts, positions, settings, found)

    def _common(
        self, name: str, parts: Sequence[Part], infos: Sequence[Info]
    ) -> tuple[tuple[int, ...], DType]:
        """The shape of all parts and origins, and the first one's type. InputError where they do not go
        together."""
        origins = [part.origin for part in parts if part.origin is not None]
        for part in origins:
            if part.name not in part.model.tensors:
                raise InputError(f"{part.model.label}: has no tensor {name}, which an edit is counted from")
        first, shape, dtype = parts[0], tuple(infos[0].shape), infos[0].dtype
        all_infos = (*infos, *(part.info for part in origins))
        for part, other in zip((*parts, *origins), all_infos, strict=True):
            if tuple(other.shape) != shape:
                self._raise_shapes(name, first, part)
            if other.dtype is dtype:
                continue
            if not (other.dtype.is_float and dtype.is_float):
                raise InputError(
                    f"{part.what} differs from {first.what}: "
                    f"{other.dtype.name} and {dtype.name} cannot be merged"
                )
        return shape, dtype

    def _raise_shapes(self, name: str, first: Part, other: Part) -> None:
        shapes = [tuple(part.info.shape) for part in (other, first)]
        raise InputError(
            f"{other.what} has shape {list(shapes[0])}, {first.what} {list(shapes[1])}"
            f"{shape_advice(name, shapes)}"
        )

    def _resolver(self, part: Slice) -> Resolver:
        if id(part) not in self._resolvers:
            self._resolvers[id(part)] = Resolver(part, self.method, self._settings, self.table)
        return self._resolvers[id(part)]

    def _output_dtype(self, name: str, parts: Sequence[Part], infos: Sequence[Info]) -> DType:
        asked = self._precision.of(name, [info.dtype for info in infos])
        if asked is not None:
            return asked
        dtype = infos[0].dtype
        if dtype.name not in OUTPUT_NAMES:
            raise InputError(
                f"{parts[0].what} is {dtype.name}, which a merge cannot be written in: give out_dtype, "
                "in a recipe `dtype: bfloat16`"
            )
        return dtype

    def _check_whole(self) -> None:
        """What is counted over the whole model is counted for the same experts everywhere."""
        first = next((output for output in self.outputs if output.is_computed), None)
        if first is None or all(o.positions == first.positions for o in self.outputs if o.is_computed):
            return
        for settings in self._settings.values():
            whole = [need.statistic for need in self.method.needs(settings) if need.scope == "model"]
            if whole:
                raise RecipeError(
                    f"`{self.method.name}` takes {whole[0]} over the whole model, but some tensors are made "
                    "of other "
                    "models than others: set `density_scope: tensor` or the like, or list the same models "
                    "everywhere"
                )

    # Curvature

    def _curvatures(
        self,
        named: Named,
        entries: Sequence[ModelEntry],
        own: Sequence[str],
        experts: Sequence[Part],
        shape: tuple[int, ...],
    ) -> tuple[Curvature | None, ...]:
        """One per expert, None where there is none."""
        if not self.method.curvature or (self.method.curvature_optional and not self.moments):
            return (Uniform(),) * len(experts)
        correct = named.part.shared.get("bias_correction", False)
        found = tuple(
            curvature_of(self._moments_of[id(e)], (name, p.name), shape, correct, e.parameters)
            for e, name, p in zip(entries, own, experts, strict=True)
        )
        if None in found and buffers.needs_no_curvature(named.name, shape):
            return (Uniform(),) * len(found)  # all experts weigh alike there
        return found

    def _with_curvature(self, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """What `missing_curvature` says of tensors without. Under `uniform` no expert's curvature can be
        compared with 1, so that all have it."""
        lacking = [output for output in outputs if None in output.curvatures]
        if not lacking:
            return outputs
        policy = self.recipe.parameters["missing_curvature"]
        if policy == "error":
            self._raise_lacking(lacking)
        found = []
        for output in outputs:
            if None in output.curvatures:
                action = KEEP_BASE if policy == "base" else MERGE
                uniform = (Uniform(),) * len(output.experts)
                output = replace(output, action=action, curvatures=uniform)
            found.append(output)
        return found

    def _raise_lacking(self, lacking: list[OutputTensor]) -> None:
        first = lacking[0]
        place = first.curvatures.index(None)
        entry = next(
            e for part in self.recipe.slices for e in part.experts if e.number == first.positions[place]
        )
        more = f" ({len(lacking)} tensors have no curvature: {listing(o.name for o in lacking)})"
        raise InputError(
            f"{self.moments[moments_key(entry)].where} has no "
            f"{first.experts[place].name!r}{more if len(lacking) > 1 else ''}; "
            "`missing_curvature: uniform` or `base` merges without it"
        )
