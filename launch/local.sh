#!/usr/bin/env bash
# Runs training (or any other mode of main.py) as N processes on this machine:
#
#   launch/local.sh 2 --config=configs/copy.py --workdir=/tmp/run
#
# Each line of output is prefixed with the number of its process. If one process fails, the others are terminated, and
# its exit code is the script's. SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 are forwarded once to every process, so
# that all save; a second signal terminates them at once.
# Virtual CPU devices for each: XLA_FLAGS=--xla_force_host_platform_device_count=4.
set -uo pipefail
set -m # process groups of their own: the terminal's Ctrl-C must not reach them a second time
usage="Usage: launch/local.sh N --config=... --workdir=..., N processes, at least 1"
number=${1:-}
[[ $number =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2; exit 1; }
shift
here=$(cd "$(dirname "$0")/.." && pwd) || exit 1
python=${PYTHON:-$here/.venv/bin/python}
port=${PORT:-$((20000 + RANDOM % 12000))}
grace_seconds=60 # for processes that save before they exit

cd "$here" || exit 1
pids=()
for ((index = 0; index < number; index++)); do
  "$python" -m perceiver_ar_jax.main "$@" --coordinator=127.0.0.1:"$port" --process_id="$index" \
    --num_processes="$number" > >(exec sed -u "s/^/[$index] /") 2>&1 &
  pids[index]=$!
done

forwarded= # processes save and exit at the first signal, and exit without saving at a second, which must not be ours
forward() {
  forwarded=1
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
      [[ -n $forwarded ]] || deadline=$((SECONDS + grace_seconds))
      if [[ -z $forwarded ]] && ((${#pids[@]})); then
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
