#!/usr/bin/env bash
# Usage: tools/setup.sh EXTRA. Makes .venv in the repository root and installs the package, editable, with one
# extra (demo, test, ...) of pyproject.toml; versions come from constraints.txt. Done before: returns at once.
set -euo pipefail

extra=${1:?usage: tools/setup.sh EXTRA}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The build's inputs. Of Python sources only the names: an editable install runs them where they are, but knows
# only the modules that were there when it was made.
fingerprint() {
    find ota_kernels -name '*.py' | LC_ALL=C sort
    find pyproject.toml CMakeLists.txt tools/constraints.txt tools/setup.sh csrc -type f |
        LC_ALL=C sort | xargs cksum
    pwd
}

python=.venv/bin/python
stamp=.venv/installed-$extra
now=$(fingerprint)  # before the build: what changes while it runs is built the next time
if [[ -f $stamp && $(<"$stamp") == "$now" ]]; then
    exit 0
fi

[[ -x $python ]] || python3 -m venv .venv
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: .venv has $("$python" --version): install python3 >= 3.10, remove .venv, and run this again" >&2
    exit 1
fi

echo "setting up .venv for $extra: a few minutes on a fresh machine" >&2
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

# The build tools go into .venv, because pip does not apply constraints to an isolated build.
pip install -c tools/constraints.txt scikit-build-core nanobind cmake ninja
pip install -c tools/constraints.txt --no-build-isolation --editable ".[$extra]"
printf '%s\n' "$now" > "$stamp"
