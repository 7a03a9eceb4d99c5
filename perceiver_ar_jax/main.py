"""Trains, evaluates and samples Perceiver AR, inspects its data, and plans for chips of another machine.

  python -m perceiver_ar_jax.main --config=configs/photos32.py --workdir=DIR [--mode=MODE]

MODE is train (the default), eval (score a split), sample (generate), score (the likelihood of a text or file),
attention (plots of what the cross-attention attends to), report (an HTML file about the run), data (inspect the data),
or plan (whether the step fits the chips of a pod).

--config names an experiment of configs/; perceiver_ar_jax/config documents every setting, and each can be overridden:
--config.train.steps=100 --config.model.num_layers=6. The same command resumes a run that was stopped.

Exit codes: 0 done; 1 bad input or config; 75 a full disk, storage out of reach or an unexpected error, after which a
restart may help (launch/supervise.sh); 128 + signal after a signal, with everything saved.
"""

from absl import flags
from etils import epy

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config, config_from_run

# Imported on first use, so that a mistake is reported before JAX and TensorFlow are imported.
with epy.lazy_imports():
  from perceiver_ar_jax import loop, plan
  from perceiver_ar_jax.data import inspect
  from perceiver_ar_jax.evaluation import evaluate
  from perceiver_ar_jax.experiments import attention_pictures, report
  from perceiver_ar_jax.models import architectures
  from perceiver_ar_jax.parallel import distributed, mesh
  from perceiver_ar_jax.sampling import write

flags.adopt_module_key_flags(command_line)
_MODES = ["train", "eval", "sample", "score", "attention", "report", "data", "plan"]
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Several processes: host:port of process 0. Not needed on TPU pods and in Slurm steps."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: their number.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: the index of this one, from 0.")


def main(config: Config) -> int:
  mode, workdir = _MODE.value, command_line.WORKDIR.value
  if mode in ("eval", "sample", "score", "attention", "report"):
    config_from_run.load_config(workdir)  # raises InputError if the workdir contains no run
  if mode == "data":
    inspect.inspect(config, workdir)
    return 0
  if mode == "report":
    print(f"Written to {report.write(workdir)}")
    return 0
  if mode == "plan":
    return plan.plan(config, workdir)
  distributed.cache_compiled()
  mesh.keep_host_memory()
  rows = {"eval": [config.eval.batch_size], "sample": [config.sample.batch_size]}
  rows["train"] = [*rows["eval"], config.train.batch_size // config.train.microbatches]
  if _NUM_PROCESSES.value is None and not distributed.in_slurm_step() and mode in rows:
    mesh.use_cpu_cores(config, rows[mode])
  distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  with distributed.end_together():
    architectures.check(config.model)  # before the seconds that importing TensorFlow takes
    if mode == "train":
      return loop.train(config, workdir)
    if mode == "eval":
      evaluate.evaluate(config, workdir)
    elif mode == "attention":
      attention_pictures.write(config, workdir)
    else:
      write.sample(config, workdir) if mode == "sample" else write.score(config, workdir)
  return 0


if __name__ == "__main__":
  command_line.run(main, required=("workdir",))
