"""Whether rows of several models' embeddings are the rows of the same tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..io.tokenizer import has_tokenizer, vocabulary_of

_SHOWN = 3
# Names that a vocabulary keeps free; a fine-tune may give one a meaning.
_FREE = re.compile(r"reserved|unused|control_\d|placeholder|dummy|\bextra_\d|(^|\W)pad_?\d", re.IGNORECASE)


def token_differences(folders: Mapping[str, Path], rows: int | None = None) -> list[str]:
    """Tokens whose rows differ between models (label -> folder), in words; empty where none does.

    Two models differ where both give one row to other tokens, or one token other rows. A token that only one
    model has is no difference, nor one in place of a name kept free (`<|reserved_3|>`). rows: ids from there
    on have no row. Models without a vocabulary that can be read are passed over.
    """
    found: list[str] = []
    seen: set[bytes] = set()
    first: tuple[str, dict[str, int]] | None = None
    for label, folder in folders.items():
        if not has_tokenizer(folder):
            continue
        try:
            digest, read = vocabulary_of(folder)
            tokens = None if digest in seen else read()
        except InputError:  # malformed: `tokenizer_source` says so where that matters
            continue
        seen.add(digest)
        if tokens is None:
            continue
        if first is None:
            first = label, tokens
            continue
        wrong = conflicts(first[1], tokens, rows)
        if wrong:
            shown = "; ".join(
                f"row {row} is {one!r} in {first[0]} and {other!r} in {label}"
                for row, one, other in wrong[:_SHOWN]
            )
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            found.append(f"tokens differ: {shown}{more}")
    return found


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
