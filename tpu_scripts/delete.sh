#!/usr/bin/env bash
# Gives the slice back. Results are in WORKDIR and stay.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ${#REST[@]} = 0 ] || fail "unknown arguments: ${REST[*]}"

if [ "$QUEUED" = yes ]; then
  # --force deletes the slice with the request, in whatever state it is.
  call gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
else
  tpu delete --quiet
fi
