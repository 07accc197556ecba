#!/usr/bin/env bash
# Installs felrec-dist with all that its tests need into the virtual environment $1.
#
# On a machine without an NVIDIA GPU, PyTorch comes as its CPU build, so that no CUDA package is pulled in; with one, the
# default build brings CUDA along. On macOS there is only one build.
set -euo pipefail
venv=${1:?"usage: launch/install.sh VENV"}
torch=2.13.0
root=$(cd "$(dirname "$0")/.." && pwd)
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
    # The first form finds a CPU build that is configured for this machine's pip; the second fetches it from PyTorch.
    pip install --quiet "torch==$torch+cpu" 2>/dev/null ||
        pip install --quiet "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
else
    pip install --quiet "torch==$torch"
fi
pip install --quiet --editable "$root[ray,s3,test]" --constraint "$root/launch/constraints.txt"
