#!/usr/bin/env bash
# Usage: tools/test_mergekit.sh [pytest arguments]. Runs this package inside of mergekit 0.1.5: installs it into the
# environment that tools/setup_mergekit.sh makes, runs the tests there, and prints a table of times per tensor.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_mergekit.sh
python=.venv-mergekit/bin/python
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install -c tools/constraints.txt scikit-build-core nanobind cmake ninja pytest hypothesis
pip install -c tools/constraints.txt --no-build-isolation --no-deps --config-settings=build-dir=build/mergekit --editable .
"$python" -m pytest -q -p no:cacheprovider -o addopts= tests/integrations/test_mergekit.py "$@"
"$python" -m bench.inside_mergekit
