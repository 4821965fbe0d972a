"""What a file is by its first bytes: pointers, web pages and other formats in the place of weights."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

HEAD_BYTES = 512

_FETCH = "fetch it again"
_LFS = "a Git LFS pointer, not the file it stands for: run `git lfs pull` there, or download it"
_ANNEX = "a git-annex pointer, not the file it stands for: run `git annex get` there, or download it"
_HTML = f"an HTML page (of a login or an error), not a model's file: {_FETCH}"

# Other formats, which no tool stores under the name of a safetensors file on purpose.
_MAGIC = {
    b"GGUF": "a GGUF file (llama.cpp): give the safetensors model that it was made from",
    b"PK\x03\x04": "a zip archive, as torch.save writes: convert it to safetensors",
    b"\x80\x02": "a pickle, as torch.save wrote: convert it to safetensors",
    b"\x80\x04": "a pickle: convert it to safetensors",
    b"\x89HDF": "an HDF5 file (Keras): convert it to safetensors",
    b"\x93NUMPY": "a NumPy array: convert it to safetensors",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it",
}


def stand_in(head: bytes) -> str | None:
    """What a file that begins with `head` is in place of a real one, and what to do; None for a real file."""
    if head.startswith((b"version https://git-lfs", b"version https://hawser")):
        return _LFS
    if len(head) < HEAD_BYTES and b"/annex/objects/" in head:
        return _ANNEX
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:16].lower()
    return _HTML if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")) else None


def not_weights(head: bytes, file_size: int) -> str | None:
    """What a file that should be safetensors and begins with `head` is instead; None where it may be one."""
    if head[4:9] == b"\0\0\0\0{":  # a length below 4 GiB, then JSON; other formats may begin like a length
        return None
    found = stand_in(head) or next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if found is not None:
        return found
    if len(head) >= 64 and not any(head):
        return f"{file_size} bytes that begin with zeros: a download that was not finished; {_FETCH}"
    # The length of a header has zeros in its last bytes; text has none.
    if len(head) > 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        shown = " ".join(head.decode("ascii").split())[:40]
        return f"a text file (it begins {shown!r}), not weights: {_FETCH}"
    return None


def check_real(path: Path) -> None:
    """InputError for a pointer, a web page, or a file that cannot be opened, such as a link whose target is
    gone."""
    try:
        with path.open("rb") as stream:
            found = stand_in(stream.read(HEAD_BYTES))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): restore it, or remove it from the folder"
        ) from error
    if found is not None:
        raise InputError(f"{path} is {found}")
