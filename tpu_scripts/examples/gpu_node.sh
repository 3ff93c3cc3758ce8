#!/usr/bin/env bash
# One machine, all of its GPUs: installs once, then runs until done.
#
#   tpu_scripts/examples/gpu_node.sh optimizer_ablation --workdir=runs/a
set -euo pipefail
[ $# -gt 0 ] || { echo "name a module of experiments/, then its flags" >&2; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ ! -d .venv ]; then
  python3 -m venv .venv
  .venv/bin/pip install -q '.[cuda,data]'
fi
status=75
# 75: told to stop, and saved.
while [ "$status" = 75 ]; do
  status=0
  .venv/bin/python -m "experiments.$1" "${@:2}" || status=$?
done
exit "$status"
