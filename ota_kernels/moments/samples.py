"""Texts of a JSONL file as token ids: a random order of its lines, the same for the same seed."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import InputError
from ..io.header import parse_json_object, quoted

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One text. line: its number in the file, from 1; ids: int64[n], n >= 2."""

    line: int
    ids: np.ndarray


@dataclass(frozen=True, slots=True)
class Drawn:
    """What `draw` found. cut: samples that were longer than allowed; skipped: texts of less than two tokens,
    in which there is nothing to predict."""

    samples: tuple[Sample, ...]
    cut: int
    skipped: int

    @property
    def predicted(self) -> int:
        """Tokens with a loss: all but each sample's first."""
        return sum(len(sample.ids) - 1 for sample in self.samples)


def draw(path: Path, tokenize: Tokenize, *, count: int, max_length: int, text_key: str, seed: int) -> Drawn:
    """Up to `count` samples in the random order of `seed`; less where the file has no more.

    tokenize: text -> ids, of which the first `max_length` are kept. Each line is a JSON object with a string
    under `text_key`; blank lines are passed over. Lines that are not drawn are not parsed. Raises InputError,
    with the line's number, for a line that is anything else, and where no line gives a sample.
    """
    if path.exists() and not path.is_file():  # lines are read in random order, which no pipe allows
        raise InputError(f"{path}: not a regular file")
    try:
        with path.open("rb") as stream:
            return _draw(stream, path, tokenize, count, max_length, text_key, seed)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _draw(
    stream: BinaryIO, path: Path, tokenize: Tokenize, count: int, max_length: int, text_key: str, seed: int
) -> Drawn:
    starts = _line_starts(stream)
    samples: list[Sample] = []
    cut = skipped = 0
    for index in np.random.Generator(np.random.Philox(seed)).permutation(len(starts)):
        stream.seek(starts[index])
        line = stream.readline()
        if not line.strip():
            continue
        where = f"{path}: line {index + 1}"
        ids = _token_ids(tokenize, _text(line, text_key, where), where)
        if len(ids) < 2:
            skipped += 1
            continue
        cut += len(ids) > max_length
        samples.append(Sample(int(index) + 1, ids[:max_length].copy()))
        if len(samples) == count:
            break
    if not samples:
        found = f"none of its {skipped} texts has two tokens" if skipped else "holds no lines"
        raise InputError(f"{path}: {found}: nothing to estimate from")
    return Drawn(tuple(samples), cut, skipped)


def _line_starts(stream: BinaryIO) -> array:
    """Byte offset of each line."""
    starts, position = array("q"), 0
    for line in stream:
        starts.append(position)
        position += len(line)
    return starts


def _text(line: bytes, key: str, where: str) -> str:
    entry = parse_json_object(line, where)
    if key not in entry:
        raise InputError(f"{where} has no key {quoted(key)}, only {quoted(list(entry))}: see --text-key")
    text = entry[key]
    if not isinstance(text, str):
        raise InputError(f"{where}: {quoted(key)} is not a string: {quoted(text)}")
    return text


def _token_ids(tokenize: Tokenize, text: str, where: str) -> np.ndarray:
    try:
        return np.asarray(tokenize(text), np.int64)
    except Exception as error:  # tokenizers are many libraries; half a surrogate pair stops most of them
        raise InputError(f"{where}: the tokenizer fails: {' '.join(str(error).split())[:200]}") from error
