#!/usr/bin/env bash
# Usage: tools/sanitize.sh [PYTEST ARGUMENT]... Builds the C++ extension with AddressSanitizer and UBSan in
# build/sanitized and runs the tests of kernels, words and lists with it; minutes, and not part of tools/test.sh.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh test
python=.venv/bin/python
"$python" -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --upgrade \
    --target build/sanitized -C cmake.define.OTA_SANITIZE=ON -C build-dir=build/sanitize .

[[ $# -gt 0 ]] || set -- tests/backends tests/select -k "not triton"
# Python itself does not carry the sanitizer's library; Python's own blocks that live to the end are no leaks.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
exec "$python" - "$@" <<'EOF'
import sys

import pytest

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, "build/sanitized")
from ota_kernels import _native

assert "sanitized" in _native.__file__, _native.__file__
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
EOF
