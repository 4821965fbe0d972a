#!/usr/bin/env bash
# Usage: tools/demo.sh [DIR] [OPTION]... Sets up .venv where needed and runs `ota-merge demo DIR`; DIR is
# demo_out in the repository root when not given.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup.sh" demo
[[ ${1:-} == [!-]* ]] || set -- "$root/demo_out" "$@"
exec "$root/.venv/bin/ota-merge" demo "$@"
