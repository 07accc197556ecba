#!/usr/bin/env bash
# Installs felrec-dist into the virtual environment VENV: launch/install.sh VENV [torch | felrec]
#
# Without the last word both steps are done; the Dockerfile makes a layer of each. From the environment:
#   TORCH_BUILD  cpu or cuda; by default cpu on a Linux machine without an NVIDIA GPU, so that no CUDA package is
#                pulled in. On macOS there is only one build.
#   EXTRAS       of pyproject.toml; by default ray,s3,torchrec,report,test
set -euo pipefail
usage="usage: launch/install.sh VENV [torch | felrec]"
venv=${1:?"$usage"}
step=${2:-all}
torch=2.13.0
root=$(cd "$(dirname "$0")/.." && pwd)
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }

if [ -z "${TORCH_BUILD:-}" ]; then
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then TORCH_BUILD=cpu; else TORCH_BUILD=cuda; fi
fi

install_torch() {
    case $TORCH_BUILD in
    cpu)
        # The first form finds a CPU build that is configured for this machine's pip; the second fetches it from PyTorch.
        pip "torch==$torch+cpu" 2>/dev/null ||
            pip "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
        ;;
    cuda) pip "torch==$torch" ;;
    *) echo "TORCH_BUILD is cpu or cuda, not $TORCH_BUILD" >&2 && exit 2 ;;
    esac
}

install_felrec() {
    local extras=${EXTRAS:-ray,s3,torchrec,report,test}
    local constraints="$root/launch/constraints.txt"
    if [ "$TORCH_BUILD" = cpu ] && [[ ",$extras," == *,torchrec,* ]]; then
        # TorchRec asks for fbgemm-gpu, the CUDA build, by name: what it needs beside that is installed first.
        extras=$(sed 's/torchrec,\?//; s/,$//' <<<"$extras")
        pip tensordict pyre-extensions torchmetrics tqdm --constraint "$constraints"
        pip --no-deps torchrec fbgemm-gpu-cpu --constraint "$constraints"
    fi
    pip --editable "${root}[$extras]" --constraint "$constraints"
}

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
case $step in
torch) install_torch ;;
felrec) install_felrec ;;
all) install_torch && install_felrec ;;
*) echo "$usage" >&2 && exit 2 ;;
esac
