"""The training loop: from a config and a workdir to trained weights, through interruptions of every kind.

The same command starts a run and resumes it. Resuming is exact because batches, random keys and updates are functions
of the seed, the data position and the step, and these are saved together. A step is saved before it is evaluated and
before samples are drawn, so that neither can cost a step.
"""

import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Callable

import jax
import psutil
import tqdm
from clu import parameter_overview
from etils import epath

from perceiver_ar_jax.config import Config, InputError, TransientError, checks, config_from_run, writing
from perceiver_ar_jax.data import splits, units, warn_once
from perceiver_ar_jax.data.loader import TrainLoader, to_global
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.models import architectures, flops
from perceiver_ar_jax.parallel import chips, distributed, sharding
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh, rows_of_processes
from perceiver_ar_jax.sampling import write
from perceiver_ar_jax.training import checkpoint, memory, metrics, signals
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import workdir as workdir_lib

_PROFILED_STEPS = 3
_SAMPLES_ON_ONE_DEVICE = 2


def train(config: Config, workdir: epath.PathLike) -> int:
  """Trains to `config.train.steps`, resuming from the newest good checkpoint; returns the exit code.

  0: done. 128 + signal number: a signal of training/signals.py arrived, everything is saved, and the same command
  resumes the run.

  Raises:
    InputError: the config does not fit the data, the devices, their memory or the workdir; another run uses the
      workdir; the loss became infinite or NaN; or the final evaluation failed. Checkpoints are left unchanged.
    TransientError: the disk is full or storage out of reach; the same command resumes once the cause is gone.
  """
  workdir, startup = epath.Path(workdir), _Startup()
  warn_once.reset()  # count the files that this run skips
  mesh = make_mesh(config.mesh)
  startup.done("devices")
  architectures.check(config.model, mesh)
  if config.train.microbatches > 1:
    check_batch(config.train.batch_size // config.train.microbatches, "train.batch_size / train.microbatches", mesh)
  check_batch(config.train.batch_size, "train.batch_size", mesh)
  evaluator = evaluate.Evaluator(config, mesh)
  num_samples = config.eval.num_samples
  if num_samples is None:
    num_samples = _SAMPLES_ON_ONE_DEVICE if mesh.size == 1 else 0
  exhibit = write.PreviewSampler(config, mesh, num_samples) if num_samples else None
  data = TrainLoader(config, rows_of_processes(mesh, config.train.batch_size), jax.process_index())
  splits.check_held_out(config)
  startup.done("data")

  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = state_lib.abstract_state(config, optimizer, mesh)
  distributed.log(parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
  with workdir_lib.own(config, workdir) as check_owner, signals.Signals() as stop_signals, jax.set_mesh(mesh):
    train_step = memory.compile_step(config, optimizer, abstract, data.spec, mesh)
    if exhibit:
      memory.check_samples(num_samples, abstract, exhibit.compile)
    startup.done("compilation")
    keep = config.train.keep_checkpoints
    with checkpoint.Checkpointer(workdir, keep=keep, before_save=check_owner) as checkpointer:
      state = checkpointer.restore(abstract, data)
      if state is None:
        state = state_lib.init_state(config, optimizer, mesh)
      else:
        distributed.log(f"Resuming from the checkpoint of step {int(state.step)}.")
      jax.block_until_ready(state)
      startup.done("weights")
      distributed.log(startup.describe())
      if stop_signals.agree(wait=True):
        distributed.log(f"{stop_signals.name}: stopped at step {int(state.step)}, before the first update.")
        return 128 + stop_signals.agreed
      settings = {
        name: value
        for name, value in config_from_run.flatten(config).items()
        if name.startswith(("model.", "train.")) and isinstance(value, (bool, int, float, str))
      }
      log = metrics.MetricsLog(
        workdir,
        first_step=int(state.step),
        total_steps=config.train.steps,
        bits_name=units.UNITS[data.task.unit].token_loss,
        settings=settings,
      )
      with log, _Profile(config.train.profile_at, workdir / "profile") as profile:
        run = _Run(config, mesh, train_step, evaluator, exhibit, checkpointer, stop_signals, log, profile)
        state, result = run(state, data)
  if stop_signals.agreed:
    distributed.log(f"{stop_signals.name}: saved at step {int(state.step)}; the same command resumes from there.")
    return 128 + stop_signals.agreed
  if num_skipped := warn_once.count("skipped"):
    distributed.log(f"{num_skipped} files or records were skipped, each with its reason above.")
  evaluator.write(result, workdir)
  distributed.log(
    f"Done. {evaluator.describe(result)}\nCurves: {epath.Path(sys.executable).with_name('tensorboard')}"
    f" --logdir={workdir}   Metrics: {workdir}/metrics.jsonl   Score again: --workdir={workdir} --mode=eval"
  )
  return 0


@dataclasses.dataclass
class _Run:
  """The loop over steps, with the objects that a step uses."""

  config: Config
  mesh: jax.sharding.Mesh
  train_step: Callable
  evaluator: evaluate.Evaluator
  exhibit: write.PreviewSampler | None
  checkpointer: checkpoint.Checkpointer
  signals: signals.Signals
  log: metrics.MetricsLog
  profile: "_Profile"

  def __call__(self, state: state_lib.TrainState, data: TrainLoader):
    """Returns (the last state, the result of the evaluation at the last step, None after a signal).

    Raises:
      InputError: the loss is not finite, or the evaluation at the last step, which is saved, failed.
    """
    train, first = self.config.train, int(state.step) + 1
    dropout_key = jax.random.fold_in(jax.random.key(self.config.seed), 1)  # the key of the seed initialises the weights
    result, pending = None, None
    self._skipped_in_a_row, self._last_report = 0, time.monotonic()
    shardings = sharding.batch_shardings(self.mesh, {name: array.shape for name, array in data.spec.items()})
    if self._is_evaluated_at(first - 1) and (first > train.steps or not self.checkpointer.has_metrics(first - 1)):
      result = self._evaluate(state.params, first - 1)  # a signal or a failure interrupted it
    for step in range(first, train.steps + 1):
      if self.signals.agreed:
        break
      # Dispatch is asynchronous: while the device computes a step, the host reads, checks and transfers the next
      # batch. No batch is drawn before its step, so the position of `data` always matches `state`.
      self.profile.before(step)
      begin = time.monotonic()
      batch = to_global(next(data), data.rows, train.batch_size, shardings)
      data_seconds = time.monotonic() - begin
      waited = pending is None or all(value.is_ready() for value in pending[1].values())
      state, step_metrics = self.train_step(state, batch, jax.random.fold_in(dropout_key, step))
      self.profile.after(step, step_metrics)
      if pending:
        self._report(*pending)  # one step late: the device never waits for the host
      pending = step, step_metrics, {"data_seconds": data_seconds, "data_wait_seconds": data_seconds * waited}
      stop, evaluates = bool(self.signals.agree()), self._is_evaluated_at(step)
      if evaluates or stop or step % train.checkpoint_every == 0:
        self._report(*pending)  # before saving: a loss that is not finite is never saved
        pending = None
        self.log.flush()
        self.checkpointer.save(state, data)
        if evaluates and not stop:
          result = self._evaluate(state.params, step)
    return state, result

  def _is_evaluated_at(self, step: int) -> bool:
    return step > 0 and (step >= self.config.train.steps or step % self.config.eval.every == 0)

  def _report(self, step: int, step_metrics: dict[str, jax.Array], host_seconds: dict[str, float]) -> None:
    """Shows a finished step and logs it every `log_every` steps; raises InputError if its loss is not finite."""
    values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
    now = time.monotonic()
    seconds, self._last_report = now - self._last_report, now
    train, finite = self.config.train, math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
    if not finite and train.on_nonfinite == "skip" and self._skipped_in_a_row < train.max_skipped:
      self.log.print(f"Step {step} was skipped: its loss is {values['loss']}, its gradient norm {values['grad_norm']}.")
    elif not finite:
      times = f", {self._skipped_in_a_row} steps in a row" if self._skipped_in_a_row > 1 else ""
      raise InputError(
        f"At step {step} the loss is {values['loss']} and the gradient norm {values['grad_norm']}{times}, so training"
        " stopped. The checkpoints before it are unchanged: resume from the newest with a lower"
        " --config.train.optimizer.learning_rate or --config.train.optimizer.clip_norm (or start over with a longer"
        " warm-up, or in float32)."
      )
    tokens_per_second = values["num_tokens"] / seconds
    self.log.progress(values["loss"], tokens_per_second)
    if step % self.config.train.log_every == 0:
      flops_per_second = flops.train_step(self.config) / seconds
      speed = {"tokens_per_second": tokens_per_second, "model_flops_per_second": flops_per_second}
      if chip := chips.chip_of_device(self.mesh.devices.flat[0].device_kind):
        speed["model_flops_utilization"] = flops_per_second / (self.mesh.size * chip.peak_flops)
      values["skipped_files"] = warn_once.count("skipped")
      self.log.write(step, {"seconds": seconds, **host_seconds, **values, **speed})

  def _evaluate(self, params, step: int) -> dict | None:
    """Scores the saved `step`, logs the metrics, and draws samples; returns None after a signal or a failure.

    After a failure, training continues: a run that ended here would end here again after every restart.

    Raises:
      InputError: the evaluation of the last step failed.
    """
    try:
      result = self.evaluator(params, step, self.signals.agree)
    except Exception as error:
      self._check_is_common(error)
      if step >= self.config.train.steps:
        if isinstance(error, TransientError):
          raise
        raise InputError(
          f"Training is complete and step {step} is saved, but its evaluation failed: {_describe(error)} Score it with"
          " --mode=eval, or run the same command again."
        ) from error
      self._warn(f"The evaluation of step {step} failed, and training continues without it: {_describe(error)}")
      result = None
    if result:
      self.log.print(self.evaluator.describe(result))
      if not self.checkpointer.has_metrics(step):
        self.log.write(step, {f"eval_{name}": value for name, value in result.items() if isinstance(value, float)})
        self.log.flush()
        self.checkpointer.add_metrics(step, {"nats_per_token": result["nats_per_token"]})
        self._draw_samples(params, step)
    self._last_report = time.monotonic()
    return result

  def _draw_samples(self, params, step: int) -> None:
    if not self.exhibit or self.signals.agreed:
      return
    self.log.print("Drawing samples for TensorBoard (--config.eval.num_samples=0: none).")
    try:
      self.log.write_samples(step, self.exhibit(params, self.signals.agree))
    except Exception as error:
      self._check_is_common(error)
      self._warn(f"No samples of step {step} were drawn: {_describe(error)}")

  def _check_is_common(self, error: Exception) -> None:
    """Raises `error` again unless every process has it: the others would wait for this one in a computation.

    Evaluation raises its InputErrors on all processes.
    """
    if jax.process_count() > 1 and not isinstance(error, InputError):
      raise error

  def _warn(self, message: str) -> None:
    # On every process: the cause may be known to one process alone.
    tqdm.tqdm.write(f"Warning: {message}", file=sys.stderr)


def _describe(error: Exception) -> str:
  """Returns the error's message; prints the traceback of an error that is not an InputError to stderr."""
  if isinstance(error, InputError):
    return str(error)
  traceback.print_exception(error)
  return f"{type(error).__name__}: {checks.one_line(error)} (see the traceback above)."


class _Startup:
  """The durations of the phases before the first step."""

  def __init__(self):
    self._last = time.time()
    self._seconds = {"imports": self._last - psutil.Process().create_time()}

  def done(self, phase: str) -> None:
    """Ends a phase."""
    now = time.time()
    self._seconds[phase], self._last = now - self._last, now

  def describe(self) -> str:
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._seconds.items())
    return f"Started in {sum(self._seconds.values()):.1f} s: {phases}."


class _Profile:
  """A jax.profiler trace of a few steps, if the config asks for one; it ends with the context at the latest."""

  def __init__(self, first: int | None, directory: epath.Path):
    self._first, self._directory, self._active = first, directory, False

  def before(self, step: int) -> None:
    if step == self._first:
      jax.profiler.start_trace(str(self._directory))
      self._active = True

  def after(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
    if self._active and step >= self._first + _PROFILED_STEPS - 1:
      jax.block_until_ready(step_metrics)
      self._stop()

  def __enter__(self) -> "_Profile":
    return self

  def __exit__(self, *unused) -> None:
    if self._active:
      self._stop()

  def _stop(self) -> None:
    self._active = False
    with writing(self._directory, "free some space, or train without --config.train.profile_at"):
      jax.profiler.stop_trace()
