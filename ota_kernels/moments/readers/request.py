"""What the user says of a checkpoint besides where it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...io.header import quoted
from ...io.reader import Checkpoint


@dataclass(frozen=True)
class Request:
    """model: the trained model; base: the one that it was trained from, whose equal parameters were frozen;
    names: of the parameters in the model's order, in the groups that blank lines make of them; as_adam: keys
    and settings that are unknown are Adam's."""

    model: Checkpoint | None = None
    base: Checkpoint | None = None
    names: tuple[tuple[str, ...], ...] = ()
    as_adam: bool = False


def read_names(path: Path) -> tuple[tuple[str, ...], ...]:
    """The names in a file, one a line; blank lines end a group. Raises InputError for a file without any, or
    with one twice."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"--names {path}: cannot be read: {reason}") from error
    groups: list[list[str]] = [[]]
    for line in map(str.strip, lines):
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    found = tuple(tuple(group) for group in groups if group)
    names = [name for group in found for name in group]
    if not names:
        raise InputError(
            f"--names {path}: holds no names: write one a line, as model.named_parameters() goes"
        )
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise InputError(f"--names {path}: names {quoted(twice)} twice")
    return found
