#!/usr/bin/env bash
# Measures steps and generation on one NVIDIA GPU, and runs the tests of models and updates there.
#
#   benchmarks/gpu.sh                                    # under 8 minutes: all limits together are 470 s
#   SMALL=1 JAX_PLATFORMS=cpu benchmarks/gpu.sh          # tries the script on a CPU
#
# Needs no network, TensorFlow or seqio: JAX, flax, optax, orbax, and absl-py, ml-collections, Pillow, pytest,
# safetensors, tqdm and wrapt suffice. PYTHON is the interpreter, OUT the folder for the results. What fails is reported,
# and the rest still runs.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-/tmp/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} XLA_PYTHON_CLIENT_PREALLOCATE=false
failed=0
small=()
imagenet64=(--config=configs/imagenet64.py --config.mesh.fsdp=1 --config.train.batch_size=8 --config.model.num_layers=6)
point_a=(--config=benchmarks/point_a.py --config.model.dtype=bfloat16)
kernels="streamed chunked reference cudnn"
tokens=2000
if [[ ${SMALL:-} ]]; then
  small=(--config.model.latent_width=32 --config.model.num_layers=1 --config.model.num_latents=16 --config.model.max_context=64
    --config.model.num_cross_heads=2 --config.model.num_self_heads=2 --config.train.batch_size=2)
  kernels="streamed chunked reference"
  tokens=48
fi

measure() { # SECONDS NAME COMMAND...: the JSON object of a benchmark, stored and printed
  local limit=$1 name=$2
  shift 2
  echo "== $name"
  if ! timeout "$limit" "$python" -m "$@" >"$out/$name.json" 2>"$out/$name.log"; then
    echo "$name failed; the end of $out/$name.log:"
    tail -3 "$out/$name.log"
    failed=1
    return
  fi
  cat "$out/$name.json"
}

for kernel in $kernels; do
  settings=("--config.model.attention=$kernel" --steps=5 --seconds=10)
  measure 40 "point_a-$kernel" benchmarks.step "${point_a[@]}" "${small[@]}" "${settings[@]}"
  measure 40 "imagenet64-$kernel" benchmarks.step "${imagenet64[@]}" "${small[@]}" "${settings[@]}"
done
measure 70 generate benchmarks.generate "${point_a[@]}" "${small[@]}" "--tokens=$tokens"
echo "== tests"
# tests/conftest.py chooses the CPU and exact products; only the second is wanted here.
export JAX_DEFAULT_MATMUL_PRECISION=highest
timeout 80 "$python" -m pytest -q --noconftest -p no:cacheprovider -m "not slow" \
  tests/models_attention_test.py tests/models_golden_test.py tests/training_loss_test.py >"$out/tests.log" 2>&1 || failed=1
tail -3 "$out/tests.log"
exit $failed
