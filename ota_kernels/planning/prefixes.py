"""Names of two models that differ by a prefix only: `model.`, `_orig_mod.`, `language_model.`, ..."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Modules that hold a whole model, and say nothing of what is in it.
_WRAPPERS = frozenset(
    {
        *("model", "transformer", "language_model", "text_model", "base_model", "backbone", "net"),
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"),
    }
)
_MOST_RULES = 4  # prefixes that one model changes: language part, vision part, head, ...


@dataclass(frozen=True)
class Renaming:
    """How the names of one model become another's.

    names: its name -> the other's, of those that differ; rules: the prefixes that change, (its, the other's);
    safe: whether every rule puts modules around others, takes them away or reorders them, or changes one
    wrapper for another (`transformer.` for `model.`). `encoder.` in place of `decoder.` is not: other tensors
    may have those names with equal shapes.
    """

    names: dict[str, str]
    rules: tuple[tuple[str, str], ...]
    safe: bool

    def __str__(self) -> str:
        return " and ".join(f"{_shown(theirs)} for {_shown(ours)}" for theirs, ours in self.rules)


def _shown(prefix: str) -> str:
    return f"`{prefix}`" if prefix else "no prefix"


def renaming(ours: Iterable[str], theirs: Iterable[str]) -> Renaming | None:
    """How names of `theirs` become those of `ours`; None where no change of prefixes explains what differs.

    Names that both have stay. The longest end that a name shares with exactly one name of the other side
    votes for a change of what stands before it; at most four changes, longest prefixes first, must then give
    every name of theirs that they apply to a name of its own.
    """
    ours, theirs = dict.fromkeys(ours), dict.fromkeys(theirs)
    only_ours = [name for name in ours if name not in theirs]
    only_theirs = [name for name in theirs if name not in ours]
    if not only_ours or not only_theirs:
        return None
    rules = _votes(only_ours, only_theirs)
    if not 0 < len(rules) <= _MOST_RULES:
        return None
    names = _apply(rules, only_theirs, set(only_ours))
    if not names or len(names) < min(len(only_ours), len(only_theirs)):
        return None
    used = tuple(rule for rule in rules if any(n.startswith(rule[0]) for n in names))
    return Renaming(names, used, all(_is_wrapper(*rule) for rule in used))


def _votes(only_ours: list[str], only_theirs: list[str]) -> list[tuple[str, str]]:
    """The changes of prefix (theirs, ours) that names ask for, longest first."""
    ends: dict[str, list[str]] = {}
    for name in only_ours:
        for _, end in _splits(name):
            ends.setdefault(end, []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in only_theirs:
        for prefix, end in _splits(name):
            found = ends.get(end, ())
            if found:
                if len(found) == 1:
                    votes[prefix, found[0].removesuffix(end)] += 1
                break
    return sorted(votes, key=lambda rule: (-len(rule[0]), rule))


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """(prefix, end) at every dot, the longest end first."""
    start = 0
    while True:
        yield name[:start], name[start:]
        start = name.find(".", start) + 1
        if start == 0:
            return


def _apply(rules: list[tuple[str, str]], only_theirs: list[str], only_ours: set[str]) -> dict[str, str]:
    """Renamed names; empty where two would become one. A name that no rule fits keeps its own."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for name in only_theirs:
        for theirs, ours in rules:
            renamed = ours + name.removeprefix(theirs)
            if name.startswith(theirs) and renamed in only_ours:
                if renamed in taken:
                    return {}
                names[name] = renamed
                taken.add(renamed)
                break
    return names


def _is_wrapper(theirs: str, ours: str) -> bool:
    one, other = theirs.split(".")[:-1], ours.split(".")[:-1]
    named = _WRAPPERS.issuperset(one) and _WRAPPERS.issuperset(other)
    return named or sorted(one) == sorted(other) or _within(one, other) or _within(other, one)


def _within(short: list[str], long: list[str]) -> bool:
    """Whether `short` is what is left of `long` when some of it is taken away."""
    rest = iter(long)
    return all(part in rest for part in short)
