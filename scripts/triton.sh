#!/bin/sh
# Triton for tests/interpreted, which runs kernels on a CPU: beside $VENV, not in it, where torch's compiler for CPUs would find it.
set -eu
: "${VENV:=.venv}"
"$VENV/bin/python" -c "import triton" 2>/dev/null ||
    "$VENV/bin/python" -m pip --disable-pip-version-check -q install --no-deps --no-compile --target "$VENV/interpreted" triton==3.7.1 ||
    echo "no Triton for this platform: tests/interpreted will be skipped"
