"""How a merge runs, and who is told how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .. import backends
from ..errors import RecipeError
from ..planning.plan import DEFAULT_BUDGET
from ..sizes import parse_size


class Progress(Protocol):
    """Told how far a merge is. Called from one thread at a time."""

    def stage(self, name: str, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...


class Silent:
    """A Progress that shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, name: str, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


@dataclass(frozen=True)
class Options:
    """How a merge runs; what it computes is the recipe's.

    device: "auto", "cpu", "cuda" or "cuda:N"; memory_limit: bytes resident on the host at most, None for
    1 GiB, on a GPU 4 GiB; shard_size: bytes of one output file at most; threads: None for every processor;
    seed: of methods that draw random numbers; tile_elements: None for what fits the limit;
    candidates_memory: bytes of undecided elements held in memory at most, the rest goes to the work folder;
    allow_crimes: models may differ in the tensors they have, in their configurations and vocabularies, and
    the notes say so; trust_remote_code: copy the Python files that a model loads its classes from (none is
    ever run); unsafe_truncate_embeddings: vocabulary tensors are cut to the fewest rows of any model;
    copy_tokenizer, write_model_card: whether they are written; lora_merge_dtype: the torch name of a type to
    which models with an adapter on them are rounded, None for not at all; pack_base: the base of packs,
    None for the recipe's or where they say it is.
    """

    backend: str = "auto"
    device: str = "auto"
    memory_limit: int | None = None
    threads: int | None = None
    shard_size: int = 5_000_000_000
    seed: int = 0
    overwrite: bool = False
    resume: bool = False
    tile_elements: int | None = None
    candidates_memory: int = DEFAULT_BUDGET
    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    copy_tokenizer: bool = True
    write_model_card: bool = True
    trust_remote_code: bool = False
    lora_merge_dtype: str | None = None
    pack_base: str | None = None

    def __post_init__(self) -> None:
        backends.check_device(self.device)
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"--threads must be at least 1, not {self.threads}")

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Options whose sizes may be text."""
        least = {"memory_limit": 1, "shard_size": 1, "candidates_memory": 0}
        sized = (key for key in least.keys() & given.keys() if given[key] is not None)
        sizes = {key: parse_size(given[key], least[key]) for key in sized}
        return cls(**given | sizes)

    def of_result(self) -> dict[str, Any]:
        """Those that the output's bytes depend on."""
        names = ("shard_size", "seed", "allow_crimes", "unsafe_truncate_embeddings", "trust_remote_code")
        names += ("lora_merge_dtype",)
        return {name: getattr(self, name) for name in names}
