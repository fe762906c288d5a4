#!/usr/bin/env bash
# Makes $VENV with what this machine can use (called by make setup).
#
# Where $PYTHON can import everything already (a cluster's module, a container), $VENV only points to it.
# Otherwise a virtual environment is made: torch first and alone, one version, because where pip is given that
# version's CPU build (PIP_ARGS), a range would still take a newer torch from PyPI, with gigabytes of CUDA; then
# the project, with the CUDA kernels where there is a GPU.
set -euo pipefail
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} PIP_ARGS=${PIP_ARGS:-}
TORCH=${TORCH:-torch==2.13.0}

case "$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" in
  3.11 | 3.12) ;;
  *) echo "error: PYTHON: $("$PYTHON" --version): Python 3.11 or 3.12 is needed; say make setup PYTHON=python3.11" >&2
     exit 2 ;;
esac

mkdir -p "$VENV/bin"
if "$PYTHON" - <<'CHECK' 2>/dev/null
import importlib.util as find
names = """torch deepspeed megatron.core transformers sentencepiece pydantic yaml numpy numba pyarrow fsspec orjson
zstandard rich matplotlib safetensors huggingface_hub xxhash psutil pytest""".split()
raise SystemExit(any(find.find_spec(name) is None for name in names))
CHECK
then
  # A wrapper, not a link: a link would lose the environment that the interpreter lies in.
  rm -f "$VENV/bin/python"
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$("$PYTHON" -c 'import sys; print(sys.executable)')" >"$VENV/bin/python"
  chmod +x "$VENV/bin/python"
  echo "setup: using $("$PYTHON" -c 'import sys; print(sys.executable)'), which has all packages"
else
  echo "setup: making $VENV (a few minutes)"
  [ -x "$VENV/bin/pip" ] || { rm -rf "$VENV"; "$PYTHON" -m venv "$VENV"; }
  extras=dev
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then extras=dev,cuda; fi
  pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check $PIP_ARGS "$@"; }
  export DS_BUILD_OPS=0
  "$VENV/bin/python" -c 'import torch' 2>/dev/null || pip "$TORCH"
  pip --editable ".[$extras]"
  echo "setup: done, extras: $extras"
fi
touch "$VENV/ready"
