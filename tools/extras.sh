#!/usr/bin/env bash
# Usage: tools/extras.sh [DIST] [EXTRA]... Each extra by itself, on top of the wheel in DIST (dist/; made by tools/wheel.sh):
# without it, the command that needs it ends with one line that names it; with it, that line is gone.
#
# Minutes and gigabytes (the packages of every extra), so no test.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
wheel=$(ls -t "${1:-dist}"/*.whl | head -1)
wheel=$(realpath "$wheel")
shift || true
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$1/bin/python" -m pip --disable-pip-version-check --quiet install -c "$root/tools/constraints.txt" "${@:2}"; }

python3 -m venv "$work/bare"
pip "$work/bare" "$wheel"
"$work/bare/bin/python" - "$work" <<'PYTHON'
import json, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

root, generator = Path(sys.argv[1]), torch.Generator().manual_seed(0)
base = torch.randn(30, 40, generator=generator)
for name in ("base", "a", "b"):
    (root / name).mkdir()
    save_file({"w": base + 0.01 * torch.randn(30, 40, generator=generator)}, root / name / "model.safetensors")
    (root / name / "config.json").write_text('{"model_type": "llama"}')
recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
recipe["parameters"] = {"density": 0.5, "weight": 1}
(root / "recipe.yaml").write_text(json.dumps(recipe))
(root / "hub.yaml").write_text(json.dumps(recipe | {"base_model": "no-such-owner/no-such-model"}))
(root / "texts.jsonl").write_text('{"text": "one"}\n{"text": "another"}\n')
(root / "adapter.py").write_text("""
import sys
from ota_kernels import OtaError
from ota_kernels.integrations import peft
try:
    with peft.accelerated():
        print("PEFT merges here")
except OtaError as error:
    sys.exit(f"error: {error}")
""")
PYTHON

cp -r bench "$work/bench"
declare -A commands=(
    [hub]="python -m ota_kernels run hub.yaml hub-out"
    [demo]="python -m ota_kernels demo demo-out --seeds 1"
    [report]="python -m ota_kernels report merged"
    [estimate]="python -m ota_kernels moments estimate base texts.jsonl v.safetensors"
    [mergekit]="python -m ota_kernels.integrations.mergekit --help"
    [peft]="python adapter.py"
    [quality]="python -m bench.quality --tables --cache quality"
    [bench]="python -m pytest -q bench/test_kernels.py --collect-only"
)
# What it says without the extra; pytest cannot name who wanted it.
declare -A words=([bench]="No module named pytest" [quality]="pip install -e '.[quality]'")

says() {
    (cd "$work" && env -u PYTHONPATH PATH="$1/bin:$PATH" HF_HUB_OFFLINE=1 ${commands[$extra]} 2>&1) || echo "exit code $?"
}

(cd "$work" && bare/bin/ota-merge run -q recipe.yaml merged)
[[ $# == 0 ]] && set -- "${!commands[@]}"
for extra in "$@"; do
    needed=${words[$extra]:-"pip install 'ota-kernels[$extra]'"}
    without=$(says "$work/bare")
    [[ $without == *"$needed"*"exit code "* && $without != *Traceback* ]] ||
        { echo "error: without $extra: $without" >&2; exit 1; }
    # An environment on top of the bare one: what is there is not fetched again.
    python3 -m venv --clear "$work/more"
    echo "$work"/bare/lib/python3*/site-packages > "$(echo "$work"/more/lib/python3*/site-packages)/bare.pth"
    pip "$work/more" "$wheel[$extra]"
    with=$(says "$work/more")
    [[ $with != *"$needed"* && $with != *Traceback* ]] || { echo "error: with $extra: $with" >&2; exit 1; }
    echo "$extra: without it, \"$(grep -F "$needed" <<< "$without" | tail -1)\"; with it, \"$(grep -v "^exit code" <<< "$with" | tail -1)\""
done
