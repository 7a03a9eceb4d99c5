"""Train, evaluate and sample Perceiver AR, look at the data first, and plan for TPUs that are not here.

  python -m perceiver_ar_jax.main --config=configs/photos32.py --workdir=DIR [--mode=MODE]

MODE is train (the default), eval (score a split), sample (generate), score (how likely a text or file is), attention
(pictures of what the cross-attend takes from), report (one HTML file about the run), data (a look at it), or plan
(compile the step for chips that are not here: what a pod would take).

--config names an experiment of configs/; perceiver_ar_jax/config tells of every setting, and each can be
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
_STREAM = flags.DEFINE_bool("stream", False, "With --mode=sample: print text as it comes.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Several processes: host:port of process 0. TPU pods and Slurm steps need none of these three."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: the number of this one, from 0.")


def main(config: Config) -> int:
  # Imported late, so that a misspelt flag is answered at once.
  if _MODE.value == "data":
    from perceiver_ar_jax.data import inspect

    inspect.inspect(config, command_line.WORKDIR.value)
    return 0
  if _MODE.value == "report":
    from perceiver_ar_jax.evaluation import report

    print(f"Written to {report.write(command_line.WORKDIR.value)}")
    return 0
  if _MODE.value == "plan":
    from perceiver_ar_jax.parallel import plan

    return plan.plan(config, command_line.WORKDIR.value)
  from perceiver_ar_jax.parallel import distributed

  distributed.keep_compiled(config.compilation_cache)
  distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  with distributed.EndTogether():
    return _on_devices(config)


def _on_devices(config: Config) -> int:
  if _MODE.value in ("sample", "score"):
    from perceiver_ar_jax.sampling import write

    if _MODE.value == "sample":
      write.sample(config, command_line.WORKDIR.value, _STREAM.value)
    else:
      write.score(config, command_line.WORKDIR.value)
    return 0
  if _MODE.value == "attention":
    from perceiver_ar_jax.evaluation import attention_maps
    from perceiver_ar_jax.sampling import prompts

    attention_maps.write(config, command_line.WORKDIR.value, prompts.read)
    return 0
  from perceiver_ar_jax.evaluation import evaluate

  if _MODE.value == "eval":
    evaluate.evaluate(config, command_line.WORKDIR.value)
    return 0
  from perceiver_ar_jax.sampling import write
  from perceiver_ar_jax.training import loop

  return loop.train(config, command_line.WORKDIR.value, evaluate.Evaluator, write.Exhibit)


if __name__ == "__main__":
  command_line.run(main, required=("workdir",))
