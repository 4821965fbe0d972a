#!/usr/bin/env bash
# Usage: tools/setup_mergekit.sh. Makes .venv-mergekit in the repository root, with mergekit 0.1.5 in it: what
# `python -m bench.against` and `python -m bench.peers` run beside this package. Done before: returns at once.
#
# mergekit is run as a program, and nothing of it is read or imported here.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=0.1.5
venv=.venv-mergekit
[[ -f $venv/installed && $(<"$venv/installed") == "$version" ]] && exit 0

[[ -x $venv/bin/python ]] || python3 -m venv "$venv"
echo "setting up $venv: a few minutes on a fresh machine" >&2
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install -c tools/constraints.txt \
    "mergekit==$version" torch
echo "$version" > "$venv/installed"
