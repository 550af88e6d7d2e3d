# Sourced by demo.sh and test.sh: makes .venv in the project's root where there is none and installs the package.
# Usage: source scripts/environment.sh EXTRA   (EXTRA may be empty)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2
    exit 2
fi
[ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
wanted="$(cat "$root/pyproject.toml" "$root/scripts/environment.sh" | cksum) ${1:-}"
stamp="$root/.venv/installed_${1:-plain}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing nnunet_sam2${1:+[$1]} into $root/.venv (a few minutes, a few GB on Linux: torch brings CUDA)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${1:+[$1]}"
    echo "$wanted" > "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
# Few threads that sleep while they wait: spinning ones burn time where cores are shared (docs/performance.md).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export nnUNet_def_n_proc="${nnUNet_def_n_proc:-1}" nnUNet_compile="${nnUNet_compile:-f}"
