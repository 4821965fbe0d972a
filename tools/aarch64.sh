#!/usr/bin/env bash
# Usage: tools/aarch64.sh [PYTEST ARGUMENT]... Cross-compiles the extension for aarch64 by Debian's compiler and runs it
# under user-mode emulation: the tests of kernels (against the reference and float64, which run here), then whole merges,
# whose bytes must be those of this machine. Needs Debian's g++-aarch64-linux-gnu and qemu-user; a few minutes.
#
# The emulated Python is Debian's, unpacked into build/aarch64 beside wheels for aarch64: nothing is installed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || { echo "error: $tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user (Debian)" >&2; exit 1; }
done
bash tools/setup.sh test
work=$PWD/build/aarch64
root=$work/root
venv=$PWD/.venv/bin
mkdir -p "$work"/{lists/partial,archives/partial}

if [[ ! -f $work/unpacked ]]; then
    : > "$work/status"
    cat > "$work/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Install-Recommends "false";
Dir::State "$work";
Dir::State::status "$work/status";
Dir::Cache "$work";
Debug::NoLocking "true";
CONF
    export APT_CONFIG=$work/apt.conf
    apt-get -qq update
    apt-get -qq -y --download-only install python3-dev libstdc++6
    for package in "$work"/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    touch "$work/unpacked"
fi
python=$(readlink -f "$root"/usr/bin/python3)
version=${python##*python}

"$venv/python" -m pip --disable-pip-version-check --quiet install --no-deps --upgrade --target "$work/site" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    --implementation cp --python-version "$version" --only-binary=:all: -c tools/constraints.txt \
    numpy safetensors click PyYAML rich psutil xxhash pygments markdown-it-py mdurl

PATH=$venv:$PATH cmake -G Ninja -S . -B "$work/build" --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" -DPython_EXECUTABLE="$venv/python" \
    -DPython_INCLUDE_DIR="$root/usr/include/python$version" -Dnanobind_DIR="$("$venv/python" -m nanobind --cmake_dir)"
PATH=$venv:$PATH cmake --build "$work/build"
rm -rf "$work/package"
mkdir "$work/package"
cp -r ota_kernels "$work/package/"
cp "$work"/build/_native*.so "$work/package/ota_kernels/_native.so"

cat > "$work/python" <<RUN
#!/bin/sh
PYTHONSAFEPATH=1 PYTHONPATH=$PWD/tools:$work/package:$work/site exec qemu-aarch64 -L "$root" "$python" "\$@"
RUN
chmod +x "$work/python"
"$work/python" -c 'import platform; from ota_kernels import _native; print(platform.machine(), *_native.instruction_sets())'

[[ $# -gt 0 ]] || set -- tests/backends tests/select/test_topk.py
PYTHONPATH=tools OTA_EMULATED="$work/python $PWD/tools/emulated.py" \
    "$venv/python" -m pytest -q -p emulated -k "native and not triton" "$@"

merges=$(mktemp -d)
trap 'rm -rf "$merges"' EXIT
"$venv/python" - "$merges" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
base = {"a.weight": rng.normal(size=(300, 400)), "b.bias": rng.normal(size=400)}


def write(path, tensors):
    path.parent.mkdir(exist_ok=True)
    save_file({name: values.astype(np.float32) for name, values in tensors.items()}, path)


write(folder / "base/model.safetensors", base)
for t in range(3):
    write(folder / f"{t}/model.safetensors", {k: v + 0.01 * rng.normal(size=v.shape) for k, v in base.items()})
    write(folder / f"{t}/v.safetensors", {k: 1e-9 * rng.random(v.shape) ** 4 for k, v in base.items()})
moments = [{"preconditioner_path": str(folder / f"{t}/v.safetensors")} for t in range(3)]
cases = {
    "ota": (moments, {"density": 0.3}),
    "ota per tensor": (moments, {"saliency_mass": 0.9, "density_scope": "tensor", "lambda": 0.7}),
    "ties": ([{"weight": 1.0}] * 3, {"density": 0.3}),
    "dare_ties": ([{"weight": 0.7}] * 3, {"density": 0.4}),
    "della": ([{"weight": 0.7}] * 3, {"density": 0.4, "epsilon": 0.2}),
    "sce": ([{}] * 3, {"select_topk": 0.3}),
    "model_stock": ([{}] * 3, {}),
}
for name, (own, shared) in cases.items():
    models = [{"model": str(folder / str(t)), "parameters": own[t]} for t in range(3)]
    recipe = {"merge_method": name.split()[0], "base_model": str(folder / "base"), "models": models}
    (folder / f"{name}.yaml").write_text(json.dumps(recipe | {"parameters": shared}))
PYTHON
for recipe in "$merges"/*.yaml; do
    name=$(basename "$recipe" .yaml)
    "$venv/ota-merge" run -q --backend native "$recipe" "$merges/here"
    "$work/python" -m ota_kernels run -q --backend native "$recipe" "$merges/there"
    cmp "$merges/here/model.safetensors" "$merges/there/model.safetensors"
    echo "merged alike: $name"
    rm -r "$merges/here" "$merges/there"
done
echo "aarch64: the kernels agree with the reference, whole merges with this machine's"
