#!/usr/bin/env bash
# Copies results to this machine: collect.sh FOLDER. Logs of all workers come along.
# Worker 0 copies WORKDIR to BUCKET, from where it comes here.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ${#REST[@]} = 1 ] || fail "name the folder to copy into"
TO="${REST[0]}"

call mkdir -p "$TO/logs"
on_workers 0 "gcloud storage rsync --recursive $(printf '%q ' "$WORKDIR" "$BUCKET")"
call gcloud storage rsync --recursive "$BUCKET" "$TO" --project="$PROJECT"
if [ "$DRY_RUN" = yes ]; then
  WORKERS=1
else
  WORKERS="$(gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" \
    --format='value(networkEndpoints.len())')"
fi
for ((worker = 0; worker < WORKERS; worker++)); do
  call gcloud compute tpus tpu-vm scp --recurse "$NAME:geomjax/logs" \
    "$TO/logs/worker_$worker" "${WHERE[@]}" --worker="$worker"
done
