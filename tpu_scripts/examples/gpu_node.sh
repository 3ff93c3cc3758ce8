#!/usr/bin/env bash
# One machine: installs once, then runs an experiment. A status of 75: told to stop, and
# saved; the same command goes on.
#
#   tpu_scripts/examples/gpu_node.sh optimizer_ablation --workdir=runs/a
set -euo pipefail
[ $# -gt 0 ] || { echo "name a module of experiments/, then its flags" >&2; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ ! -d .venv ]; then
  python3 -m venv .venv
  .venv/bin/pip install -q '.[cuda,data]'
fi
exec .venv/bin/python -m "experiments.$1" "${@:2}"
