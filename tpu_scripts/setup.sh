#!/usr/bin/env bash
# Installs the same commit and the same jax on every worker.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ${#REST[@]} = 0 ] || fail "unknown arguments: ${REST[*]}"

COMMIT="${COMMIT:-$(git -C "$HERE" rev-parse HEAD)}"
on_workers all "set -euo pipefail
if [ ! -d geomjax ]; then git clone -q $(printf %q "$REPOSITORY") geomjax; fi
cd geomjax
git fetch -q origin
git checkout -q $(printf %q "$COMMIT")
python3 -m venv .venv
.venv/bin/pip install -q -U pip
.venv/bin/pip install -q 'jax[tpu]==$JAX_VERSION' 'jaxlib==$JAX_VERSION' '.[data]'
.venv/bin/python -c 'import jax; assert jax.__version__ == \"$JAX_VERSION\"'"
