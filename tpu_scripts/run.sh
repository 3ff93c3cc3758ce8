#!/usr/bin/env bash
# Runs an experiment on every worker until it is done, through preemptions.
#
#   tpu_scripts/run.sh optimizer_ablation --config=configs/optimizer_ablation.py
#
# Every worker runs the same command, with --workdir from env.sh, and notes its exit
# status beside its log. All 0: done. 75: told to stop, and saved, so it is run again. A
# slice that is gone is deleted, created and set up, and the run goes on from its newest
# checkpoint; what of this fails is tried again. Anything else is a failure of the run, which running again would not mend.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ${#REST[@]} -gt 0 ] || fail "name a module of experiments/, then its flags"

MODULE="${REST[0]}"
check_module "$MODULE"
FLAGS="$(printf '%q ' "${REST[@]:1}" --workdir="$WORKDIR")"
LOG="logs/$MODULE.log"
STATUS="logs/$MODULE.status"
COMMAND="cd geomjax && mkdir -p logs && rm -f $STATUS; set -o pipefail
.venv/bin/python -m experiments.$MODULE ${FLAGS}2>&1 | tee -a $LOG
status=\$?; echo \$status > $STATUS; exit \$status"

SCRIPTS=(--env="$ENV_FILE")
if [ "$DRY_RUN" = yes ]; then
  on_workers all "$COMMAND"
  exit
fi
set_up=yes # What is there when we begin.
again() {
  echo "$1; trying again"
  sleep "${RETRY_SECONDS:-30}"
}
for attempt in $(seq 1 "${ATTEMPTS:-100}"); do
  now="$(state)"
  case "$now" in
    READY) ;;
    PREEMPTED | TERMINATED | MISSING)
      echo "slice $NAME is $now: creating it again (attempt $attempt)"
      "$HERE/delete.sh" "${SCRIPTS[@]}" || true
      set_up=no
      if ! "$HERE/create.sh" "${SCRIPTS[@]}"; then
        again "slice $NAME was not created"
        continue
      fi
      ;;
    *)
      echo "slice $NAME is $now: waiting"
      sleep "${RETRY_SECONDS:-30}"
      continue
      ;;
  esac
  if [ "$set_up" = no ]; then
    if ! "$HERE/setup.sh" "${SCRIPTS[@]}"; then
      again "slice $NAME was not set up"
      continue
    fi
    set_up=yes
  fi
  if on_workers all "$COMMAND"; then
    echo "$MODULE is done; results are in $WORKDIR"
    exit 0
  fi
  now="$(state)"
  if [ "$now" = READY ]; then
    # gcloud's own status does not tell the workers apart, nor a lost connection.
    found="$(on_workers all "cat geomjax/$STATUS" | grep -x '[0-9]\+' | sort -nu | xargs)" ||
      fail "the connection was lost; $MODULE may still run, see logs.sh $MODULE"
    case "$found" in
      75 | "0 75") ;;
      *) fail "$MODULE failed, statuses of the workers: $found; see logs.sh $MODULE" ;;
    esac
  fi
  echo "$MODULE was interrupted; running it again"
  sleep "${RETRY_SECONDS:-30}"
done
fail "$MODULE is not done after ${ATTEMPTS:-100} attempts"
