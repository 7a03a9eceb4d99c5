#!/usr/bin/env bash
# Restarts a command whenever it dies, until it has finished:
#
#   launch/supervise.sh launch/local.sh 2 --config=configs/copy.py --workdir=/tmp/run
#   launch/supervise.sh .venv/bin/python -m perceiver_ar_jax.main --config=configs/copy.py --workdir=/tmp/run
#
# A run resumes exactly from its newest good checkpoint, so the command stays the same. Exit codes: 0 (done) and 1 (bad
# input or config) end the script. Any other code restarts the command, such as 75 (a full disk, storage not available, an
# unexpected error) or 137 (kill -9). SIGTERM, SIGINT, SIGHUP and SIGUSR1 are forwarded once to the command, which saves,
# and end the script.
# The pause before a restart is PAUSE_SECONDS (5), and doubles up to 300 while the command dies within HEALTHY_SECONDS
# (300) of its start. After MAX_RESTARTS (10) restarts in a row, about 25 minutes, the next such death ends the script with
# its code.
set -uo pipefail
set -m # a process group of its own for the command: the terminal's Ctrl-C must not reach it a second time
(($#)) || { echo "Usage: launch/supervise.sh COMMAND [ARGUMENT...]" >&2; exit 1; }
max_restarts=${MAX_RESTARTS:-10} healthy_seconds=${HEALTHY_SECONDS:-300} pause_seconds=${PAUSE_SECONDS:-5}

signal='' child=''
forward() {
  signal=$1
  [[ -n $child ]] && kill -s "$1" "$child" 2>/dev/null
}
for name in TERM INT HUP USR1; do
  # shellcheck disable=SC2064 # expands now
  trap "forward $name" "$name"
done

restarts=0 pause=$pause_seconds
while true; do
  begin=$SECONDS
  "$@" &
  child=$!
  while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait`, not the command
  child=
  ((code == 0 || code == 1)) && exit "$code"
  [[ -n $signal ]] && exit "$code"
  ((SECONDS - begin >= healthy_seconds)) && restarts=0 pause=$pause_seconds
  if ((++restarts > max_restarts)); then
    echo "Supervisor: died $restarts times in a row within $healthy_seconds s; giving up (code $code)." >&2
    exit "$code"
  fi
  echo "Supervisor: ended with code $code; restarting in $pause s ($restarts)." >&2
  sleep "$pause" &
  wait $! # unlike sleep itself, wait lets a trap run at once
  [[ -n $signal ]] && exit "$code"
  ((pause = pause * 2 > 300 ? 300 : pause * 2))
done
