"""Whether rows of several models' embeddings are the rows of the same tokens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import InputError
from ..io.tokenizer import has_tokenizer, vocabulary_of

_SHOWN = 3
# Names that a vocabulary keeps free; a fine-tune may give one a meaning.
_FREE = re.compile(r"reserved|unused|control_\d|placeholder|dummy|\bextra_\d|(^|\W)pad_?\d", re.IGNORECASE)


def token_differences(
    folders: Mapping[str, Path], rows: int | None = None, written: Path | None = None
) -> list[str]:
    """Tokens whose rows differ between models (label -> folder), in words; empty where none does.

    Two models differ where both give one row to other tokens, or one token other rows. A token that only one
    model has is no difference, nor one in place of a name kept free (`<|reserved_3|>`). rows: ids from there
    on have no row. written: the folder whose tokenizer is written, which must have no more tokens than rows
    where another model's fits. Models without a vocabulary that can be read are passed over.
    """
    vocabularies = _read(folders)
    found: list[str] = []
    known: dict[str, int] = {}
    owner: dict[int, str] = {}  # row -> the first model that gives it a meaning
    for label, tokens in vocabularies.items():
        wrong = conflicts(known, tokens, rows) if known else []
        if wrong:
            shown = "; ".join(
                f"row {row} is {one!r} in {owner.get(row, next(iter(vocabularies)))} and {other!r} in {label}"
                for row, one, other in wrong[:_SHOWN]
            )
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            found.append(f"tokens differ: {shown}{more}")
        for token, row in tokens.items():
            owner.setdefault(row, label)
            known.setdefault(token, row)
    return found + _beyond(vocabularies, folders, rows, written)


def _read(folders: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """The vocabularies of models (label -> token -> id) where there are several; of equal ones the first."""
    readers: dict[bytes, tuple[str, Callable[[], dict[str, int] | None]]] = {}
    for label, folder in folders.items():
        if has_tokenizer(folder):
            with contextlib.suppress(InputError):  # malformed: `tokenizer_source` says so where that matters
                digest, read = vocabulary_of(folder)
                readers.setdefault(digest, (label, read))
    found = {}
    for label, read in readers.values() if len(readers) > 1 else ():
        with contextlib.suppress(InputError):
            tokens = read()
            if tokens is not None:
                found[label] = tokens
    return found


def _beyond(
    vocabularies: Mapping[str, Mapping[str, int]],
    folders: Mapping[str, Path],
    rows: int | None,
    written: Path | None,
) -> list[str]:
    """Where the written tokenizer has ids without a row, though another model's has none."""
    most = {label: max(tokens.values(), default=-1) for label, tokens in vocabularies.items()}
    whose = next((label for label in most if folders[label] == written), None)
    if whose is None or rows is None or most[whose] < rows or min(most.values()) >= rows:
        return []
    return [f"the tokenizer of {whose} has ids up to {most[whose]}, but the embeddings {rows} rows"]


def conflicts(
    ours: Mapping[str, int], theirs: Mapping[str, int], rows: int | None = None
) -> list[tuple[int, str, str]]:
    """(row, our token, their token) of rows that two vocabularies (token -> id) use for other tokens."""
    if ours == theirs:
        return []
    here = {row: token for token, row in ours.items() if rows is None or row < rows}
    there = {row: token for token, row in theirs.items() if rows is None or row < rows}
    found = []
    for row in sorted(here.keys() | there.keys()):
        one, other = here.get(row), there.get(row)
        if one == other or (one is not None and ours.get(one) == theirs.get(one)):
            continue
        named = [token is not None and not _FREE.search(token) for token in (one, other)]
        moved = (named[0] and theirs.get(one, row) != row) or (named[1] and ours.get(other, row) != row)
        replaced = all(named)
        if moved or replaced:
            found.append((row, one or "nothing", other or "nothing"))
    return found
