#!/usr/bin/env bash
# Runs one training (or anything else main.py does) as N processes on this machine:
#
#   launch/local.sh 2 --config=configs/copy.py --workdir=/tmp/run
#
# Each process's output comes with its number in front. If one fails, the others are ended, and its exit code is the
# script's. SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 reach every process once, so that all save; a second one ends
# them at once. Virtual CPU devices for each: XLA_FLAGS=--xla_force_host_platform_device_count=4.
set -uo pipefail
set -m # process groups of their own: the terminal's Ctrl-C must not reach them a second time
usage="Usage: launch/local.sh N --config=... --workdir=..., N processes, at least 1"
number=${1:-}
[[ $number =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2; exit 1; }
shift
here=$(cd "$(dirname "$0")/.." && pwd) || exit 1
python=${PYTHON:-$here/.venv/bin/python}
port=${PORT:-$((20000 + RANDOM % 12000))}
grace_seconds=60 # for those that save before they end

cd "$here" || exit 1
pids=()
for ((index = 0; index < number; index++)); do
  "$python" -m perceiver_ar_jax.main "$@" --coordinator=127.0.0.1:"$port" --process_id="$index" \
    --num_processes="$number" > >(exec sed -u "s/^/[$index] /") 2>&1 &
  pids[index]=$!
done

told= # processes save and end at the first signal, and drop everything at the second: it must not be ours
forward() {
  told=1
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done
}
for name in TERM INT HUP USR1; do
  # shellcheck disable=SC2064 # expands now
  trap "forward $name" "$name"
done

result=0 deadline=
while ((${#pids[@]})); do
  for index in "${!pids[@]}"; do
    kill -0 "${pids[index]}" 2>/dev/null && continue
    wait "${pids[index]}"
    code=$?
    unset "pids[$index]"
    if ((code && !result)); then
      result=$code
      [[ -n $told ]] || deadline=$((SECONDS + grace_seconds))
      if [[ -z $told ]] && ((${#pids[@]})); then
        echo "Process $index ended with code $code; ending the other ${#pids[@]}." >&2
        forward TERM
      fi
    fi
  done
  if [[ -n $deadline ]] && ((SECONDS > deadline && ${#pids[@]})); then
    echo "Still running after $grace_seconds s: $(printf '%s ' "${!pids[@]}"); killing them." >&2
    forward KILL
  fi
  sleep 0.2 &
  wait $! # unlike sleep itself, wait lets a trap run at once
done
exit "$result"
