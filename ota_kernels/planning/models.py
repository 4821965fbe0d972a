"""What a merge takes tensors from: a checkpoint's files, or a caller's dictionary. Both are a Model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ..io.curvature import Held
from ..io.float8 import source_of
from ..io.quantised import Quantised
from ..io.reader import Checkpoint
from ..tensors.computed import Source
from ..tensors.dtypes import DType


class Info(NamedTuple):
    """What is known of a tensor before any element is read. dtype: as it is stored."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Model(Protocol):
    """Tensors by name. label: what errors call it; tensors: shape and dtype of each, in order; config: what
    its config.json says, None without one; tied_embeddings: whether the output matrix is the embeddings."""

    label: str

    @property
    def tensors(self) -> Mapping[str, Info]: ...

    @property
    def config(self) -> dict[str, Any] | None: ...

    @property
    def tied_embeddings(self) -> bool: ...

    def source(self, name: str, stands_for: str | None = None) -> Source:
        """Where the elements of a tensor come from. stands_for: the output matrix that it is taken for."""

    def bytes_per_element(self, name: str) -> int:
        """Bytes that are read for an element."""

    def what(self, name: str) -> str:
        """What errors call a tensor."""

    def fingerprint(self) -> list:
        """Changes when the model does."""

    def close(self) -> None: ...


class Moments(Protocol):
    """The second moments of one expert; methods take the name of a parameter."""

    def held(self, name: str, bias_correction: bool = False) -> Held | None:
        """Shape and curvature; None where there is none."""

    def what(self, name: str) -> str:
        """What errors call it."""

    @property
    def where(self) -> str:
        """What errors call all of it."""

    @property
    def source_format(self) -> str | None:
        """What they were made from; None where nobody said."""


class Stored:
    """The Model that a checkpoint is."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.label = checkpoint.label
        self.tensors: Mapping[str, Info] = checkpoint.tensors
        self.fingerprint, self.close = checkpoint.fingerprint, checkpoint.close

    def source(self, name: str, stands_for: str | None = None) -> Source:
        return self.checkpoint.buffer(name)

    @property
    def config(self) -> dict[str, Any] | None:
        return self.checkpoint.config

    @property
    def tied_embeddings(self) -> bool:
        return self.checkpoint.tied_embeddings

    def bytes_per_element(self, name: str) -> int:
        return self.tensors[name].dtype.itemsize

    def what(self, name: str) -> str:
        return f"{self.label}: {name}"


class Dequantised(Stored):
    """The Model that a checkpoint of float8 tensors with scales is: weights, computed from codes and scales.
    Scales and markers are no tensors of it."""

    def __init__(self, checkpoint: Checkpoint, quantised: Quantised) -> None:
        super().__init__(checkpoint)
        self._scaled = quantised.scaled
        self.tensors = {n: info for n, info in checkpoint.tensors.items() if n not in quantised.helpers}

    def source(self, name: str, stands_for: str | None = None) -> Source:
        scaled = self._scaled.get(name)
        if scaled is None:
            return self.checkpoint.buffer(name)
        return source_of(self.checkpoint, name, scaled)
