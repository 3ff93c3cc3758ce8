#!/usr/bin/env bash
# Mounts WORKDIR's file system on every worker, and installs the same commit and jax.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ${#REST[@]} = 0 ] || fail "unknown arguments: ${REST[*]}"

COMMIT="${COMMIT:-$(git -C "$HERE" rev-parse HEAD)}"
on_workers all "set -euo pipefail
${MOUNT:-}
if [ ! -d geomjax ]; then git clone -q $(printf %q "$REPOSITORY") geomjax; fi
cd geomjax
git fetch -q origin
git checkout -q $(printf %q "$COMMIT")
python3 -m venv .venv
.venv/bin/pip install -q -U pip
.venv/bin/pip install -q 'jax[tpu]==$JAX_VERSION' 'jaxlib==$JAX_VERSION' '.[data]'
.venv/bin/python -c 'import jax; assert jax.__version__ == \"$JAX_VERSION\"'"
