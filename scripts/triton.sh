#!/bin/sh
# Triton for tests/interpreted, which runs kernels on a CPU, and compiles them for GPUs: beside $VENV, not in it, where torch's compiler for CPUs would find it.
set -eu
: "${VENV:=.venv}"
if "$VENV/bin/python" -c "import triton" 2>/dev/null; then
    echo "Triton comes with this torch"
elif [ "$(uname -s)" = Linux ]; then
    "$VENV/bin/python" -m pip --disable-pip-version-check -q install --no-deps --no-compile --upgrade \
        --target "$VENV/interpreted" triton==3.7.1
else
    echo "there is no Triton for this platform: tests/interpreted will be skipped"
fi
mkdir -p "$VENV/interpreted"
touch "$VENV/interpreted"
