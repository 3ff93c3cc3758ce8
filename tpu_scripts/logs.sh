#!/usr/bin/env bash
# Prints the end of a run's log: logs.sh MODULE [WORKER], by default of all workers.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ${#REST[@]} -gt 0 ] || fail "name the module that was run"
check_module "${REST[0]}"
lines="$(printf %q "${LINES_OF_LOG:-50}")"
on_workers "${REST[1]:-all}" "tail -n $lines geomjax/logs/${REST[0]}.log"
