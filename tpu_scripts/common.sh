# shellcheck shell=bash
# shellcheck disable=SC2034  # REST is read by the scripts that source this.
# What every script shares: flags, the env file, and gcloud with --dry-run.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
DRY_RUN=no
ENV_FILE="${GEOMJAX_TPU_ENV:-$HERE/env.sh}"
REST=()
# Flags that are not ours stay in REST, in order.
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY_RUN=yes ;;
    --env=*) ENV_FILE="${1#--env=}" ;;
    *) REST+=("$1") ;;
  esac
  shift
done

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

[ -f "$ENV_FILE" ] || fail "no $ENV_FILE; copy $HERE/env.sh.example and fill it in"
# shellcheck source=env.sh.example
. "$ENV_FILE"
for name in PROJECT ZONE NAME ACCELERATOR RUNTIME SPOT QUEUED REPOSITORY \
  JAX_VERSION WORKDIR BUCKET; do
  [ -n "${!name:-}" ] || fail "$name is not set in $ENV_FILE"
done
for name in SPOT QUEUED; do
  case "${!name}" in yes | no) ;; *) fail "$name is ${!name}; expected yes or no" ;; esac
done
case "$WORKDIR" in
  *://*) fail "WORKDIR is $WORKDIR; expected a folder: mount the bucket, see README.md" ;;
  /*) ;;
  *) fail "WORKDIR is $WORKDIR; expected an absolute path, mounted on every worker" ;;
esac
case "$BUCKET" in gs://?*) ;; *) fail "BUCKET is $BUCKET; expected gs://..." ;; esac
WHERE=(--project="$PROJECT" --zone="$ZONE")

# Runs a command, or with --dry-run prints it, quoted so that it can be pasted.
call() {
  if [ "$DRY_RUN" = yes ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Refuses what is no module of experiments/: it goes into command lines and paths.
check_module() {
  case "$1" in "" | *[!a-z0-9_.]*) fail "$1 is no module name" ;; esac
}

tpu() {
  call gcloud compute tpus tpu-vm "$1" "$NAME" "${WHERE[@]}" "${@:2}"
}

# Runs one command line on the given workers: all, or a number.
on_workers() {
  tpu ssh --worker="$1" --command="$2"
}

# The state of the slice: READY, PREEMPTED, ..., or MISSING if there is none. Fails if
# that cannot be told, so that no slice is given back for want of an answer.
state() {
  local answer
  if answer="$(gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" \
    --format='value(state)' 2>&1)"; then
    tail -n 1 <<<"$answer"
  elif grep -q NOT_FOUND <<<"$answer"; then
    echo MISSING
  else
    fail "the state of $NAME is not known: $answer"
  fi
}
