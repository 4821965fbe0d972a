#!/usr/bin/env bash
# Usage: tools/test.sh [PYTEST ARGUMENT]... Sets up .venv where needed, lints, and runs the tests, on every
# processor; -n 0 runs them in one process.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh test
.venv/bin/ruff check
.venv/bin/ruff format --check
# The tests start hundreds of processes, which would all compile the same modules.
export PYTHONDONTWRITEBYTECODE=
exec .venv/bin/python -m pytest -n auto --dist worksteal "$@"
