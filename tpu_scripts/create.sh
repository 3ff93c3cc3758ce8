#!/usr/bin/env bash
# Asks for the slice of env.sh and waits until it is ready.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ${#REST[@]} = 0 ] || fail "unknown arguments: ${REST[*]}"

KIND=(--accelerator-type="$ACCELERATOR")
if [ "$SPOT" = yes ]; then KIND+=(--spot); fi
if [ "$QUEUED" = no ]; then
  tpu create "${KIND[@]}" --version="$RUNTIME"
  exit
fi
call gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" \
  --node-id="$NAME" --runtime-version="$RUNTIME" "${KIND[@]}"
[ "$DRY_RUN" = no ] || exit 0
while true; do
  granted="$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format='value(state.state)')"
  echo "queued resource $NAME: $granted"
  case "$granted" in
    ACTIVE) break ;;
    FAILED | SUSPENDED | SUSPENDING) fail "the request ended as $granted" ;;
  esac
  sleep "${POLL_SECONDS:-60}"
done
