#!/bin/sh
# Makes $VENV and installs the package with everything that tests and the demo need.
# torch comes first and by its own rule: a machine without an NVIDIA driver gets the CPU build, never gigabytes of CUDA.
set -eu
: "${PYTHON:=python3}" "${VENV:=.venv}"
CPU_TORCH="torch==2.13.0+cpu"

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/python -m pip --disable-pip-version-check -q"
INSTALL="$PIP install --no-compile"   # compiled at the end, on all cores
if ! "$VENV/bin/python" -c "import torch" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1; then
        $INSTALL "torch>=2.11,<2.15"
    elif [ "$(uname -s)" = Darwin ]; then
        $INSTALL "torch==2.13.0"   # its only build there
    else
        # A wheel that pip finds by itself, or PyTorch's own index of CPU builds.
        $INSTALL --no-deps "$CPU_TORCH" 2>/dev/null ||
            $INSTALL --no-deps --index-url https://download.pytorch.org/whl/cpu "$CPU_TORCH"
        $INSTALL "torch==2.13.0"   # its dependencies; the build stays
    fi
fi
# fairscale has no wheel, and in an isolated build it would pull a torch of its own.
$INSTALL "setuptools>=78.1.1" wheel "numpy>=1.26"
$INSTALL --no-build-isolation "fairscale==0.4.13"
$INSTALL --no-build-isolation -e ".[serve,dev]"
# What every process imports; the rest, three times as much, is compiled where it is first used. torch holds templates that are
# no Python: what does not compile does not matter.
LIB=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$VENV/bin/python" -m compileall -q -j 0 "$LIB/torch" "$LIB/sympy" "$LIB/numpy" >/dev/null 2>&1 || true
"$VENV/bin/python" - <<'PY'
import torch
print(f"installed: torch {torch.__version__}, CUDA {torch.cuda.is_available()}")
PY
