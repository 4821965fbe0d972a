"""Small neighbouring tensors merged as one: what a tensor costs beside its bytes is paid once for many.

A bundle is a run of output tensors of one form (settings, types, files, curvature) that lie one after the
other in every input and in the output, and whose methods look at each element alone. Engine, state and sinks
see one tensor, under the number of its first one; reports and errors name the members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..backends import Backend
from ..io.writer import OutputTensor as Place
from ..planning.outputs import MERGE, OutputTensor
from ..recipe.methods import Method
from ..recipe.settings import Settings
from ..tensors import array as resident
from ..tensors.buffer import Buffer
from ..tensors.computed import Source
from ..tensors.curvature import Curvature, Full, Uniform
from ..tensors.result import Counts
from ..tensors.segment import Segment
from ..tensors.terms import Terms, Words
from ..tensors.tile import TensorInputs

SMALL = 1 << 12  # elements of a tensor that may be bundled: a kernel takes a few microseconds for them
LARGEST = 1 << 16  # elements of a bundle
FEWEST = 32  # tensors of a bundle: fewer are not worth it


@dataclass(frozen=True)
class Bundle:
    """members: in order; ends: int64[members], where each ends in the bundle; place: of all, in the file."""

    members: Sequence[OutputTensor]
    ends: np.ndarray
    place: Place
    inputs: TensorInputs

    def member(self, position: int) -> tuple[OutputTensor, int]:
        """The tensor of an element of the bundle, and the element's flat index there."""
        i = int(np.searchsorted(self.ends, position, side="right"))
        return self.members[i], position - (int(self.ends[i - 1]) if i else 0)


def can_be_bundled(method: Method, settings: Settings, words: Words) -> bool:
    """Whether elements merge without looking at the tensor they are of, and what is kept of each tensor can
    be counted by scores."""
    apart = ("low rank", "ranks", "signs")
    alone = all(need.scope == "model" and need.statistic not in apart for need in method.needs(settings))
    plain = words.select in ("all", "at least") and words.weigh in ("constant", "curvature", "alone")
    repairs = settings.shared.get("on_nonfinite") == "base"
    of_roles = method.keeps_base(settings, "embedding") or method.whole(settings)
    return alone and plain and words.score not in ("row magnitude", "spread") and not repairs and not of_roles


def bundles_of(
    outputs: Sequence[OutputTensor],
    places: Sequence[Place],
    may: Callable[[OutputTensor, TensorInputs], bool],
) -> tuple[dict[int, TensorInputs], dict[int, Bundle]]:
    """What is merged, by the number of its (first) output: inputs of tensors, and of bundles; and those.
    may: whether a tensor's form can be bundled, asked once for its settings."""
    tensors: dict[int, TensorInputs] = {}
    bundles: dict[int, Bundle] = {}
    known: dict[int, bool] = {}
    for run in _runs(outputs, places, may, known):
        first = run[0][0]
        if len(run) < FEWEST:
            tensors |= dict(run)
            continue
        inputs = [one for _, one in run]
        last = first + len(run)
        ends = np.cumsum([one.numel for one in inputs])
        name = f"{outputs[first].name} to {outputs[last - 1].name}"
        place = replace(places[first], name=name, shape=(int(ends[-1]),), end=places[last - 1].end)
        bundles[first] = Bundle(outputs[first:last], ends, place, _joined(inputs, int(ends[-1])))
        tensors[first] = bundles[first].inputs
    return tensors, bundles


def _runs(outputs, places, may, known) -> Iterator[list[tuple[int, TensorInputs]]]:
    """Neighbours that go together, one after the other."""
    run: list[tuple[int, TensorInputs]] = []
    filled = 0
    for i, output in enumerate(outputs):
        if not output.is_computed:
            continue
        one = output.inputs()
        small = output.action == MERGE and 0 < one.numel <= SMALL and not one.is_computed
        if small and id(output.settings) not in known:
            known[id(output.settings)] = may(output, one)
        fits = small and known[id(output.settings)]
        if run and not (
            fits and filled + one.numel <= LARGEST and _follows(i, one, run[-1], outputs, places)
        ):
            yield run
            run, filled = [], 0
        run.append((i, one))
        filled += one.numel
        if not fits:
            yield run
            run, filled = [], 0
    if run:
        yield run


def _follows(
    i: int,
    one: TensorInputs,
    last: tuple[int, TensorInputs],
    outputs: Sequence[OutputTensor],
    places: Sequence[Place],
) -> bool:
    """Whether output number i is of the form of the last one, and lies right behind it everywhere."""
    j, before = last
    if i != j + 1 or places[i].begin != places[j].end or places[i].shard != places[j].shard:
        return False
    if outputs[i].settings is not outputs[j].settings or outputs[i].positions != outputs[j].positions:
        return False
    if one.out_dtype != before.out_dtype or any(one.origins) or any(before.origins):
        return False
    return all(map(_adjoin, before.buffers, one.buffers)) and all(
        map(_alike, before.curvatures, one.curvatures)
    )


def _adjoin(first: Source, second: Source) -> bool:
    return (
        first.offset >= 0
        and second.offset == first.offset + first.data.nbytes
        and second.origin == first.origin
        and second.dtype == first.dtype
    )


def _alike(first: Curvature, second: Curvature) -> bool:
    if isinstance(first, Uniform):
        return isinstance(second, Uniform)
    full = isinstance(first, Full) and isinstance(second, Full)
    return full and first.bias_correction == second.bias_correction


def _joined(inputs: Sequence[TensorInputs], numel: int) -> TensorInputs:
    """One tensor of the elements of neighbours. Nothing is copied."""
    first, last = inputs[0], inputs[-1]
    curvatures = [
        a if isinstance(a, Uniform) else Full(_through(a.values, b.values), a.bias_correction)
        for a, b in zip(first.curvatures, last.curvatures, strict=True)
    ]
    return replace(
        first,
        shape=(numel,),
        base=None if first.base is None else _through(first.base, last.base),
        experts=tuple(map(_through, first.experts, last.experts)),
        curvatures=tuple(curvatures),
    )


def _through(first: Buffer, last: Buffer) -> Buffer:
    """From the first buffer's first byte to the last one's last, in one mapped file."""
    nbytes = last.offset + last.data.nbytes - first.offset
    if last.data.ctypes.data - first.data.ctypes.data != last.offset - first.offset:
        raise ValueError(f"{first.origin} is mapped twice")
    data = np.lib.stride_tricks.as_strided(first.data, (nbytes,), (1,), writeable=False)
    return Buffer(data, first.dtype, first.origin, first.offset)


def kept_by_member(
    backend: Backend, tile: TensorInputs, terms: Terms, ends: np.ndarray, segment: Segment
) -> list[list[int]]:
    """Of each member of a bundle, what a merge of a segment of it by exact thresholds keeps: elements that
    nobody keeps, then the kept ones of each expert."""
    at = np.concatenate([[0], np.clip(ends - segment.start, 0, tile.numel)])
    masks = [np.ones(tile.numel, bool) for _ in terms.experts]
    if terms.words.select == "at least":
        for t, expert in enumerate(terms.experts):
            masks[t] = resident.host(backend.scores(tile, t, terms)[0]) >= np.float32(expert.threshold)
    columns = [~np.logical_or.reduce(masks), *masks]
    sums = [np.concatenate([[0], np.cumsum(column)]) for column in columns]
    return np.stack([np.diff(each[at]) for each in sums], axis=1).tolist()


def counts_of_members(bundle: Bundle, counts: Counts) -> Iterator[tuple[OutputTensor, Counts]]:
    """What was counted for each; what is counted of all together stands at the first one."""
    rest = {"overflow": counts.overflow, "repaired": counts.repaired, "repeats": counts.repeats}
    for output, (unkept, *kept) in zip(bundle.members, counts.members, strict=True):
        yield output, Counts(kept, unkept, thresholds=counts.thresholds, **rest)
        rest = {}


def by_output(
    outputs: Sequence[OutputTensor], counts: Sequence[Counts | None], bundles: Mapping[int, Bundle]
) -> Iterator[tuple[OutputTensor, Counts]]:
    """(output, its counts) of every output that was merged."""
    for i, (output, found) in enumerate(zip(outputs, counts, strict=True)):
        if output.action != MERGE or found is None:
            continue
        yield from counts_of_members(bundles[i], found) if i in bundles else [(output, found)]


def places_of(places: Iterable[Place], bundles: Mapping[int, Bundle]) -> list[Place]:
    """Where outputs lie by number; at a bundle's number, all of it."""
    return [bundles[i].place if i in bundles else place for i, place in enumerate(places)]
