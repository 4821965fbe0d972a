#!/usr/bin/env bash
# Usage: tools/test.sh [PYTEST ARGUMENT]... Sets up .venv where needed, lints, and runs the tests.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh test
.venv/bin/ruff check
.venv/bin/ruff format --check
exec .venv/bin/python -m pytest "$@"
