#!/usr/bin/env bash
# A training run on a slice of Cloud TPU VMs, from its creation to its deletion:
#
#   export NAME=imagenet64 ZONE=us-central2-b TYPE=v4-256       # and PROJECT, if it is not gcloud's default
#   launch/tpu_vm.sh create                                      # QUEUED=1: wait in the queue; SPOT=1: cheaper, preemptible
#   launch/tpu_vm.sh setup                                       # this commit and its packages on all workers
#   launch/tpu_vm.sh run --config=configs/imagenet64.py --workdir=gs://BUCKET/imagenet64
#   launch/tpu_vm.sh logs                                        # follow worker 0; logs 3: worker 3
#   launch/tpu_vm.sh stop                                        # SIGTERM: all workers save and exit
#   launch/tpu_vm.sh delete
#
#   launch/tpu_vm.sh keep --config=... --workdir=gs://...        # all of these, again after every preemption, until done
#
# `run` with the same arguments resumes from the newest checkpoint, so the workdir must outlive the slice. VERSION is the
# runtime version of the machines' image, by default the one for TYPE.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
poll_seconds=${POLL_SECONDS:-60}

fail() {
  echo "Error: $*" >&2
  exit 1
}

[[ $# -gt 0 ]] || fail "Give a command: create, setup, run, logs, status, stop, keep or delete (see the top of $0)."
command=$1
shift
[[ -n ${NAME:-} && -n ${ZONE:-} ]] || fail "Set NAME and ZONE: export NAME=imagenet64 ZONE=us-central2-b TYPE=v4-256"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

tpu() { gcloud compute tpus "$@" "${where[@]}"; }

on_workers() { # on_workers WORKER SHELL_COMMAND
  tpu tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

runtime_version() {
  case $TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE=$TYPE: set VERSION too, the runtime version of its image." ;;
  esac
}

create() {
  [[ -n ${TYPE:-} ]] || fail "Set TYPE, the slice: v4-256, v5litepod-256, v5p-128, v6e-256, ..."
  local version=${VERSION:-}
  [[ -n $version ]] || version=$(runtime_version)
  local machine=(--accelerator-type="$TYPE" --runtime-version="$version" ${SPOT:+--spot})
  if [[ -n ${QUEUED:-} ]]; then
    tpu queued-resources create "$NAME" --node-id="$NAME" "${machine[@]}"
    local state=
    until [[ $state == ACTIVE ]]; do
      state=$(tpu queued-resources describe "$NAME" --format="value(state.state)")
      echo "$(date +%H:%M:%S) queued resource $NAME: $state"
      case $state in
        ACTIVE) ;;
        FAILED | SUSPENDED | SUSPENDING) fail "The request failed ($state): run launch/tpu_vm.sh delete, then create again." ;;
        *) sleep "$poll_seconds" ;;
      esac
    done
  else
    tpu tpu-vm create "$NAME" "${machine[@]}"
  fi
}

setup() {
  local archive
  archive=$(mktemp -d)/perceiver_ar_jax.tar.gz
  git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  tpu tpu-vm scp "$archive" "$NAME": --worker=all
  rm -r "$(dirname "$archive")"
  on_workers all "set -e
    mkdir -p perceiver_ar_jax
    tar -xzf perceiver_ar_jax.tar.gz -C perceiver_ar_jax
    cd perceiver_ar_jax
    for python in python3.13 python3.12 python3.11; do command -v \$python > /dev/null && break; done
    if ! command -v \$python > /dev/null || ! \$python -m venv .venv; then
      sudo apt-get update -q
      sudo apt-get install -qy software-properties-common
      sudo add-apt-repository -y ppa:deadsnakes/ppa
      sudo apt-get install -qy python3.11-venv
      python3.11 -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet --editable '.[tpu]'"
}

run() {
  [[ $# -gt 0 ]] || fail "run needs main.py's arguments: --config=... --workdir=gs://..."
  local arguments
  arguments=$(printf '%q ' "$@")
  # A separate shell stores the exit code. A process that is running already is not disturbed.
  on_workers all "cd perceiver_ar_jax
    if [ -e pid ] && kill -0 \$(cat pid) 2> /dev/null; then echo It is running already.; exit 1; fi
    rm -f exit_code
    nohup bash -c '.venv/bin/python -m perceiver_ar_jax.main \"\$@\" & echo \$! > pid; wait \$!; echo \$? > exit_code' \
      run ${arguments}>> train.log 2>&1 < /dev/null &"
}

logs() { on_workers "${1:-0}" "tail -n 100 -F perceiver_ar_jax/train.log"; }

stop() { on_workers all "kill -TERM \$(cat perceiver_ar_jax/pid)"; }

status() { # prints the slice's state, or nothing if the slice does not exist
  tpu tpu-vm describe "$NAME" --format="value(state)" 2> /dev/null || true
}

request() { # prints the same for the queued resource
  [[ -z ${QUEUED:-} ]] || tpu queued-resources describe "$NAME" --format="value(state.state)" 2> /dev/null || true
}

delete() {
  if [[ -n ${QUEUED:-} ]]; then
    tpu queued-resources delete "$NAME" --force --quiet
  else
    tpu tpu-vm delete "$NAME" --quiet
  fi
}

keep() {
  [[ $# -gt 0 ]] || fail "keep needs main.py's arguments: --config=... --workdir=gs://..."
  local state code
  while true; do
    state=$(status)
    code=
    if [[ $state == READY ]]; then
      code=$(on_workers 0 "cat perceiver_ar_jax/exit_code 2> /dev/null || true") || code=unreachable
    fi
    case $state/$code in
      READY/0) echo "Done."; return 0 ;;
      READY/1) fail "The run ended with exit code 1, which a restart would not change: see launch/tpu_vm.sh logs" ;;
      READY/) ;; # it is running
      READY/unreachable) echo "$(date +%H:%M:%S) worker 0 does not answer" ;;
      READY/*)
        echo "$(date +%H:%M:%S) the run ended with exit code $code; restarting it"
        run "$@"
        ;;
      CREATING/ | STARTING/ | RESTARTING/ | REPAIRING/) ;;
      *)
        echo "$(date +%H:%M:%S) slice $NAME: ${state:-does not exist}; creating it again"
        if [[ -n $state$(request) ]]; then delete || true; fi
        if ! { "$0" create && "$0" setup && "$0" run "$@"; }; then
          echo "$(date +%H:%M:%S) that failed; trying again"
        fi
        ;;
    esac
    sleep "$poll_seconds"
  done
}

case $command in
  create | setup | run | logs | status | stop | keep | delete) "$command" "$@" ;;
  *) fail "$command is unknown. Known: create, setup, run, logs, status, stop, keep, delete." ;;
esac
