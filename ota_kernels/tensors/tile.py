"""What the backends receive: flat views of the inputs of one output tensor, cut into tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .array import Array, is_resident, joined
from .buffer import Buffer
from .computed import Source, is_computed
from .curvature import Curvature, Full, Uniform
from .dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorInputs:
    """All inputs of one output tensor, or of one tile of it.

    base: None where the method has no base; experts and curvatures: one per expert, in recipe order; origins:
    what each expert's edit is taken from, where some is not the base (None: the base); start: flat index of
    the first element in its tensor; index: int64[n], the flat indices where the elements were gathered.
    """

    name: str
    shape: tuple[int, ...]
    out_dtype: DType
    base: Source | None
    experts: tuple[Source, ...]
    curvatures: tuple[Curvature, ...]
    origins: tuple[Source | None, ...] = ()
    start: int = 0
    index: Array | None = None

    @property
    def numel(self) -> int:
        """Elements of this view."""
        return len(self.experts[0])

    @property
    def is_resident(self) -> bool:
        """Whether all buffers are on a device. What is computed is computed on the host."""
        return not self.is_computed and is_resident(self.experts[0].data)

    @property
    def is_computed(self) -> bool:
        """Whether some elements are computed when they are sliced; tiles of whole rows then compute them
        once."""
        return any(map(is_computed, self.buffers))

    @property
    def columns(self) -> int:
        """Elements of a row of what is computed; 1 where nothing is."""
        return next((b.columns for b in self.buffers if is_computed(b)), 1)

    @property
    def buffers(self) -> list[Source]:
        """Every buffer that has one value per element: base, experts, curvature that is not factored."""
        weights = [b for b in (self.base, *self.experts, *self.origins) if b is not None]
        return [*weights, *(b for c in self.curvatures for b in c.buffers)]

    @property
    def stored(self) -> TensorInputs:
        """Only what lies somewhere: for asking for pages and letting go of them, which computes nothing."""
        if not self.is_computed:
            return self
        base = None if self.base is None or is_computed(self.base) else self.base
        experts = tuple(e for e in self.experts if not is_computed(e))
        curvatures = tuple(c for c in self.curvatures if not any(map(is_computed, c.buffers)))
        return replace(self, base=base, experts=experts, curvatures=curvatures, origins=())

    @property
    def made(self) -> TensorInputs:
        """The whole tensor with nothing left to compute; itself where nothing is."""
        return self.slice(0, self.numel) if self.is_computed else self

    def reads(self, start: int, stop: int) -> Iterator[Buffer]:
        """The stored elements that elements [start, stop) come from."""
        for buffer in self.buffers:
            if is_computed(buffer):
                yield from buffer.parts(start // buffer.columns, -(-stop // buffer.columns))
            else:
                yield buffer.slice(start, stop)

    def slice(self, start: int, stop: int) -> TensorInputs:
        """The tile of elements [start, stop); name and shape stay those of the whole tensor."""
        return TensorInputs(
            self.name,
            self.shape,
            self.out_dtype,
            None if self.base is None else self.base.slice(start, stop),
            tuple(e.slice(start, stop) for e in self.experts),
            tuple(c.slice(start, stop) for c in self.curvatures),
            tuple(None if o is None else o.slice(start, stop) for o in self.origins),
            self.start + start,
            None if self.index is None else self.index[start:stop],
        )

    def gather(self, positions: Array) -> TensorInputs:
        """The elements at `positions` (int64[m]) as a tile of their own, copied; compressed curvature becomes
        one float32 value per element."""
        return replace(
            self,
            base=None if self.base is None else self.base.gather(positions),
            experts=tuple(e.gather(positions) for e in self.experts),
            curvatures=tuple(c.gather(positions) for c in self.curvatures),
            origins=tuple(None if o is None else o.gather(positions) for o in self.origins),
            index=positions + self.start if self.index is None else self.index[positions],
        )


def concatenated(tiles: Sequence[TensorInputs]) -> TensorInputs:
    """The elements of tiles of one form, whose curvature has a value per element or none, as one tile."""
    if len(tiles) == 1:
        return tiles[0]

    def together(buffers: Iterable[Buffer]) -> Buffer:
        first, *rest = buffers
        return Buffer(joined([first.data, *(b.data for b in rest)]), first.dtype, first.origin)

    def curvature(curvatures: Sequence[Curvature]) -> Curvature:
        first = curvatures[0]
        if isinstance(first, Uniform):
            return first
        return Full(together(c.values for c in curvatures), first.bias_correction)

    return replace(
        tiles[0],
        base=None if tiles[0].base is None else together(t.base for t in tiles),
        experts=tuple(map(together, zip(*(t.experts for t in tiles), strict=True))),
        curvatures=tuple(map(curvature, zip(*(t.curvatures for t in tiles), strict=True))),
        origins=tuple(
            None if o[0] is None else together(o) for o in zip(*(t.origins for t in tiles), strict=True)
        ),
        index=joined([t.index for t in tiles]),
    )
