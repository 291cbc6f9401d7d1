#!/usr/bin/env bash
# Make the checkout's virtual environment, install what training needs, and say what this machine can do.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: ./setup_training.sh [--python PATH] [--check]

  --python PATH   Python of 3.11 or newer to make .venv with (default: python3)
  --check         install nothing, only say what is there
  -h, --help      this text
TEXT
}

python="python3" check=false
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --check) check=true; shift ;;
        --python)
            [ $# -ge 2 ] || { echo "error: --python needs a value: see --help" >&2; exit 2; }
            python="$2"
            shift 2
            ;;
        *) echo "error: $1 is unknown: see --help" >&2; exit 2 ;;
    esac
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "$python" in */*) python="$(cd "$(dirname "$python")" 2>/dev/null && pwd)/$(basename "$python")" ;; esac
cd "$root"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: $python: no Python of 3.11 or newer: install one and give --python" >&2
    exit 2
}
if [ "$check" = false ]; then
    make venv PYTHON="$python"
fi
[ -x .venv/bin/python ] && python=.venv/bin/python
"$python" - <<'PY' || { echo "error: packages are missing: run this without --check" >&2; exit 2; }
import platform
import shutil
import sys

try:
    import pytorch_lightning
    import torch

    import vq_gan_3d
except ImportError as error:
    print(f"missing: {error.name}")
    sys.exit(1)
print(f"python {platform.python_version()}, torch {torch.__version__}, lightning {pytorch_lightning.__version__}")
for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    properties = torch.cuda.get_device_properties(number)
    print(f"GPU {number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
if not torch.cuda.is_available():
    print("no GPU: training runs on the CPU")
print(f"free disk here: {shutil.disk_usage('.').free / 2**30:.0f} GiB")
PY
echo "ready: patchwise_512x512x604/launch_distributed_training.sh --help"
