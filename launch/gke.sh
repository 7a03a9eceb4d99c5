#!/usr/bin/env bash
# A training run on a TPU slice of a GKE cluster that has the JobSet controller and a node pool of the slice's shape:
#
#   export NAME=imagenet64 IMAGE=REGISTRY/perceiver_ar_jax:TAG SLICE=v5e:16x16
#   launch/gke.sh apply --config=configs/imagenet64.py --workdir=gs://BUCKET/imagenet64
#   launch/gke.sh show  --config=...   # the manifest alone
#   launch/gke.sh logs                 # follow the first host
#   launch/gke.sh delete
#
# The image is launch/Dockerfile's. JobSet restarts all hosts when one fails; they resume from the newest checkpoint.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

fail() {
  echo "Error: $*" >&2
  exit 1
}

[[ $# -gt 0 ]] || fail "Give a command: apply, show, logs or delete (see the top of $0)."
command=$1
shift
[[ -n ${NAME:-} ]] || fail "Set NAME, the run's name: lower-case letters, digits and dashes."

manifest() {
  [[ $# -gt 0 ]] || fail "$command needs main.py's arguments: --config=... --workdir=gs://..."
  [[ -n ${IMAGE:-} ]] || fail "Set IMAGE, the container image built from launch/Dockerfile."
  local version=${SLICE:-} topology chips=1 hosts_chips=4 accelerator text
  topology=${version#*:} version=${version%%:*}
  case $version in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    *) fail "Set SLICE, version and shape of the TPU slice: v5e:16x16, v4:4x4x8, v5p:4x4x4, v6e:8x8." ;;
  esac
  [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "SLICE=$SLICE has no shape: write v5e:16x16 or v4:4x4x8."
  for size in ${topology//x/ }; do chips=$((chips * size)); done
  ((chips >= hosts_chips)) || hosts_chips=$chips
  text=$(grep -v '^#' "$here/gke_jobset.yaml")
  text=${text//@NAME@/"$NAME"}
  text=${text//@IMAGE@/"$IMAGE"}
  text=${text//@ACCELERATOR@/"$accelerator"}
  text=${text//@TOPOLOGY@/"$topology"}
  text=${text//@HOSTS@/"$((chips / hosts_chips))"}
  text=${text//@CHIPS@/"$hosts_chips"}
  # A JSON list is YAML too.
  text=${text//@ARGUMENTS@/"$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")"}
  printf '%s\n' "$text"
}

case $command in
  show) manifest "$@" ;;
  apply)
    text=$(manifest "$@")
    kubectl apply -f - <<< "$text"
    ;;
  logs) kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  delete) kubectl delete jobset "$NAME" ;;
  *) fail "$command is unknown. Known: apply, show, logs, delete." ;;
esac
