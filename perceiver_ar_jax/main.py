"""Trains, evaluates and samples Perceiver AR, inspects its data, and plans for chips of another machine.

  python -m perceiver_ar_jax.main --config=configs/photos32.py --workdir=DIR [--mode=MODE]

MODE is train (the default), eval (score a split), sample (generate), score (the likelihood of a text or file),
attention (pictures of what the cross-attention attends to), report (one HTML file about the run), data (inspect the
data), or plan (compile the step for the chips of a pod: does it fit, and what does it need).

--config names an experiment of configs/; perceiver_ar_jax/config documents every setting, and each can be
overridden: --config.train.steps=100 --config.model.num_layers=6. The same command resumes a run that was stopped.

Exit codes: 0 done; 1 bad input or config; 75 a full disk, storage out of reach or an unexpected error, after which a
restart may help (launch/supervise.sh); 128 + signal after a signal, with everything saved.
"""

from absl import flags

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config

flags.adopt_module_key_flags(command_line)
_MODES = ["train", "eval", "sample", "score", "attention", "report", "data", "plan"]
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_STREAM = flags.DEFINE_bool("stream", False, "With --mode=sample: print text as it is generated.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Several processes: host:port of process 0. Not needed on TPU pods and in Slurm steps."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: their number.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: the index of this one, from 0.")


def main(config: Config) -> int:
  # Each mode imports what it needs, so that a misspelt flag is answered before JAX and TensorFlow are imported.
  if _MODE.value == "data":
    from perceiver_ar_jax.data import inspect

    inspect.inspect(config, command_line.WORKDIR.value)
    return 0
  if _MODE.value == "report":
    from perceiver_ar_jax.experiments import report

    print(f"Written to {report.write(command_line.WORKDIR.value)}")
    return 0
  if _MODE.value == "plan":
    from perceiver_ar_jax import plan

    return plan.plan(config, command_line.WORKDIR.value)
  from perceiver_ar_jax.parallel import distributed

  distributed.cache_compiled(config.compilation_cache)
  distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  with distributed.EndTogether():
    return _on_devices(config)


def _on_devices(config: Config) -> int:
  from perceiver_ar_jax.models import architectures

  architectures.check(config.model)  # before the seconds that importing TensorFlow takes
  if _MODE.value in ("sample", "score"):
    from perceiver_ar_jax.sampling import write

    if _MODE.value == "sample":
      write.sample(config, command_line.WORKDIR.value, _STREAM.value)
    else:
      write.score(config, command_line.WORKDIR.value)
    return 0
  if _MODE.value == "attention":
    from perceiver_ar_jax.experiments import attention_pictures

    attention_pictures.write(config, command_line.WORKDIR.value)
    return 0
  from perceiver_ar_jax.evaluation import evaluate

  if _MODE.value == "eval":
    evaluate.evaluate(config, command_line.WORKDIR.value)
    return 0
  from perceiver_ar_jax import loop

  return loop.train(config, command_line.WORKDIR.value)


if __name__ == "__main__":
  command_line.run(main, required=("workdir",))
