#!/usr/bin/env bash
# Starts a command again whenever it dies, until it is done:
#
#   launch/supervise.sh launch/local.sh 2 --config=configs/copy.py --workdir=/tmp/run
#   launch/supervise.sh .venv/bin/python -m perceiver_ar_jax.main --config=configs/copy.py --workdir=/tmp/run
#
# A run goes on exactly from its newest good checkpoint, so nothing needs to be told to it. It is not started again when
# it is done (0), when its settings are wrong (1), or when SIGTERM or Ctrl-C came to this script, which hands them on.
# MAX_RESTARTS (10) deaths in a row, each within HEALTHY_SECONDS (300) of its start, end the script with the last code.
set -uo pipefail
(($#)) || { echo "Usage: launch/supervise.sh COMMAND [ARGUMENT...]" >&2; exit 1; }
max_restarts=${MAX_RESTARTS:-10} healthy_seconds=${HEALTHY_SECONDS:-300} pause_seconds=${PAUSE_SECONDS:-5}

signal='' child=
forward() {
  signal=$1
  [[ -n $child ]] && kill -s "$1" "$child" 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward INT' INT

restarts=0
while true; do
  begin=$SECONDS
  "$@" &
  child=$!
  while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait`, not the command
  child=
  ((code == 0 || code == 1)) && exit "$code"
  [[ -n $signal ]] && exit "$code"
  ((SECONDS - begin >= healthy_seconds)) && restarts=0
  if ((++restarts > max_restarts)); then
    echo "Supervisor: died $restarts times in a row within $healthy_seconds s; giving up (code $code)." >&2
    exit "$code"
  fi
  echo "Supervisor: ended with code $code; starting it again ($restarts)." >&2
  sleep "$pause_seconds" &
  wait $! # unlike sleep itself, wait lets a trap run at once
  [[ -n $signal ]] && exit "$code"
done
