#!/usr/bin/env bash
# Encodes a task's documents once, so that training reads the stored events:
#
#   launch/cache_tasks.sh --config=configs/pg19.py --config.data.data_dir=DIR --output=CACHE
#
# Then train with --config.data.cache_dir=CACHE. Beam is installed into an environment of its own, CACHE_VENV
# (.venv-cache), since it requires older versions of some packages than training. All arguments are passed to
# perceiver_ar_jax.data.cache. On Dataflow, first run `.venv-cache/bin/pip install 'apache-beam[gcp]'`, then add
#   --beam_options=--runner=DataflowRunner,--project=P,--region=R,--temp_location=gs://B/tmp,--setup_file=./setup.py
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${CACHE_VENV:-.venv-cache}
if [[ ! -e $venv/installed || launch/cache_requirements.txt -nt $venv/installed || setup.py -nt $venv/installed ]]; then
  echo "Installing Apache Beam into $venv: a few minutes, the first time only."
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet --editable . --requirement launch/cache_requirements.txt
  touch "$venv/installed"
fi
exec "$venv/bin/python" -m perceiver_ar_jax.data.cache "$@"
