"""The training loop: from a config and a workdir to trained weights, through interruptions of every kind.

The same command starts a run and resumes it. Resuming is exact because batches, random keys and updates are functions
of the seed, the data position and the step, and these are saved together. A step is saved before it is evaluated and
before samples are drawn, so that neither can cost a step.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import psutil
from clu import parameter_overview
from etils import epath

from perceiver_ar_jax.config import Config, InputError, TransientError, checks, require
from perceiver_ar_jax.data import splits, units, warn_once
from perceiver_ar_jax.data.loader import TrainLoader, to_global
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.parallel import chips, distributed, sharding
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh, rows_of_processes
from perceiver_ar_jax.sampling import sampler, write
from perceiver_ar_jax.training import checkpoint, memory, metrics, pretrained
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import step as step_lib
from perceiver_ar_jax.training import workdir as workdir_lib

_PROFILED_STEPS = 3
_MAX_AHEAD = 2  # steps of the host before the devices: more would store more batches and delay the response to a signal
_SHOW_SECONDS = 1.0  # between fetches for the progress bar; several processes fetch, and may fail, at the same steps
_STDOUT, _STDERR = 1, 2
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def train(config: Config, workdir: epath.PathLike) -> int:
  """Trains to `config.train.steps`, resuming from the newest good checkpoint.

  Returns the exit code: 0, or 128 + signal number after a signal of `Signals`, with everything saved. Raises InputError
  if the config does not fit the data, the devices, their memory or the workdir, another run uses the workdir, the loss
  became infinite or NaN, or the final evaluation failed; TransientError if the disk is full or storage out of reach.
  """
  workdir, settings = epath.Path(workdir), config.train
  warn_once.reset()  # count the files that this run skips
  mesh = make_mesh(config.mesh)
  architectures.check(config.model, mesh)
  rows = "train.batch_size" + (" / train.microbatches" if settings.microbatches > 1 else "")
  check_batch(settings.batch_size // settings.microbatches, rows, mesh)
  starts_from = settings.init_from if settings.init_from and not workdir_lib.has_checkpoints(workdir) else None
  if starts_from:
    workdir_lib.check_initial_weights(config, starts_from)
  evaluator = evaluate.Evaluator(config, mesh)
  num_samples = config.eval.num_samples
  if num_samples is None:
    on_cpu = mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1  # virtual devices share the memory
    num_samples = 2 if mesh.size == 1 or on_cpu else 0
  preview = None
  if num_samples:
    sample = dataclasses.replace(config.sample, num_samples=num_samples, batch_size=num_samples)
    preview = sampler.Sampler(dataclasses.replace(config, sample=sample), mesh=mesh)
  data = TrainLoader(config, rows_of_processes(mesh, settings.batch_size), jax.process_index())
  next(splits.eval_documents(config))  # raises InputError if no document can be read
  optimizer = optimizer_lib.make_optimizer(settings.optimizer, settings.steps)
  abstract = step_lib.abstract_state(config, optimizer, mesh)
  distributed.log(parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
  with contextlib.ExitStack() as stack:
    check_owner = stack.enter_context(workdir_lib.own(config, workdir))
    stop_signals = stack.enter_context(Signals())
    stack.enter_context(jax.set_mesh(mesh))
    train_step = memory.compile_step(config, optimizer, abstract, data.spec, mesh)
    checkpointer = checkpoint.Checkpointer(workdir, keep=settings.keep_checkpoints, before_save=check_owner)
    stack.enter_context(checkpointer)
    if state := checkpointer.restore(abstract, data):
      distributed.log(f"Resuming from the checkpoint of step {int(state.step)}.")
    else:
      params = None
      if starts_from:
        step, params = pretrained.restore(config.model, starts_from, abstract.params)
        distributed.log(f"Starting from the weights of step {step} in {starts_from}.")
      state = step_lib.init_state(config, optimizer, mesh, params)
    jax.block_until_ready(state)
    distributed.log(f"Started in {time.time() - psutil.Process().create_time():.1f} s.")
    stop_signals.agree(wait=True)  # with those that arrived before the first update
    bits_name = units.UNITS[data.task.unit].token_loss
    log = stack.enter_context(metrics.MetricsLog(workdir, config, int(state.step), bits_name))
    run = _Run(config, workdir, mesh, train_step, evaluator, preview, checkpointer, stop_signals, log)
    state, result = run(state, data, profile=stack.enter_context(contextlib.ExitStack()))
  if stop_signals.agreed:
    distributed.log(f"{stop_signals.name}: saved at step {int(state.step)}; the same command resumes from there.")
    return 128 + stop_signals.agreed
  if num_skipped := warn_once.count("skipped"):
    distributed.log(f"{num_skipped} files or records were skipped, each with its reason above.")
  evaluator.write(result, workdir)
  curves = f"{epath.Path(sys.executable).with_name('tensorboard')} --logdir={workdir}"
  distributed.log(f"Done. {evaluator.describe(result)}\nCurves: {curves}   Metrics: {workdir}/metrics.jsonl")
  return 0


class _Step(NamedTuple):  # an update that the devices may still be computing
  number: int
  metrics: dict[str, jax.Array]
  data_seconds: float  # to create its batch on the host
  data_wait_seconds: float  # the same if the devices may have waited for it, else 0


@dataclasses.dataclass
class _Run:
  """The loop over steps, with the objects that a step uses."""

  config: Config
  workdir: epath.Path
  mesh: jax.sharding.Mesh
  train_step: Callable
  evaluator: evaluate.Evaluator
  preview: sampler.Sampler | None
  checkpointer: checkpoint.Checkpointer
  signals: "Signals"
  log: metrics.MetricsLog

  def __call__(self, state: step_lib.TrainState, data: TrainLoader, profile: contextlib.ExitStack):
    """Returns (the last state, the result of the evaluation at the last step, None after a signal)."""
    train, first = self.config.train, int(state.step) + 1
    dropout_key = jax.random.fold_in(jax.random.key(self.config.seed), 1)  # the key of the seed initializes the weights
    result, pending, ahead = None, [], min(_MAX_AHEAD, train.log_every)
    self._skipped_in_a_row, self._last_fetch = 0, time.monotonic()
    shardings = sharding.batch_shardings(self.mesh, {name: array.shape for name, array in data.spec.items()})
    is_owed = first > train.steps or not self._has_metrics(first - 1)
    if self._is_evaluated_at(first - 1) and is_owed and not self.signals.agreed:
      result = self._evaluate(state.params_to_evaluate, first - 1)  # a signal or a failure interrupted it
    for step in range(first, train.steps + 1):
      if self.signals.agreed:
        break
      # Dispatch is asynchronous: while the device computes a step, the host reads, checks and transfers the next
      # batch. No batch is drawn before its step, so the position of `data` always matches `state`. Metrics stay on
      # the devices until several steps are fetched together, without the newest: the devices never wait for the host.
      if step == train.profile_at:
        profile.enter_context(jax.profiler.trace(str(self.workdir / "profile")))
      begin = time.monotonic()
      batch = to_global(next(data), train.batch_size, shardings)
      data_seconds = time.monotonic() - begin
      waited = not pending or all(value.is_ready() for value in pending[-1].metrics.values())
      state, step_metrics = self.train_step(state, batch, dropout_key)
      if train.profile_at and step == train.profile_at + _PROFILED_STEPS - 1:
        jax.block_until_ready(step_metrics)
        profile.close()
      pending.append(_Step(step, step_metrics, data_seconds, data_seconds * waited))
      jax.block_until_ready(pending[-1 - ahead : -ahead])
      is_bar_due = jax.process_count() == 1 and time.monotonic() - self._last_fetch >= _SHOW_SECONDS
      if len(pending) > 1 and (pending[-2].number % train.log_every == 0 or is_bar_due):
        self._report(pending[:-1])
        pending = pending[-1:]
      stop, evaluates = bool(self.signals.agree()), self._is_evaluated_at(step)
      if evaluates or stop or step % train.checkpoint_every == 0:
        self._report(pending)  # before saving: a loss that is not finite is never saved
        pending = []
        self.log.flush()
        self.checkpointer.save(state, data)
        if evaluates and not stop:
          result = self._evaluate(state.params_to_evaluate, step)
    return state, result

  def _is_evaluated_at(self, step: int) -> bool:
    return step > 0 and (step >= self.config.train.steps or step % self.config.eval.every == 0)

  def _report(self, steps: Sequence[_Step]) -> None:
    """Fetches, checks and shows the metrics of consecutive steps, and logs the last one every `log_every` steps.

    Logged times are means over `steps`. Raises InputError if a loss is not finite.
    """
    fetched = jax.device_get([step.metrics for step in steps])
    now, train, last = time.monotonic(), self.config.train, steps[-1].number
    seconds, self._last_fetch = (now - self._last_fetch) / len(steps), now
    speed = {"tokens_per_second": float(sum(values["num_tokens"] for values in fetched)) / len(steps) / seconds}
    for step, values in zip(steps, fetched):
      self._check(step.number, float(values["loss"]), float(values["grad_norm"]))
      self.log.progress(float(values["loss"]), speed["tokens_per_second"])
    if last % train.log_every == 0:
      times = ("data_seconds", "data_wait_seconds")
      host = {name: sum(getattr(step, name) for step in steps) / len(steps) for name in times}
      values = {name: float(value) for name, value in fetched[-1].items()}
      speed["model_flops_per_second"] = architectures.train_flops(self.config) / seconds
      if peak_flops := chips.peak_flops(self.mesh.devices.flat[0].device_kind):
        speed["model_flops_utilization"] = speed["model_flops_per_second"] / (self.mesh.size * peak_flops)
      host |= {"seconds": seconds, "skipped_files": warn_once.count("skipped")}
      self.log.write(last, host | values | speed)

  def _check(self, step: int, loss: float, grad_norm: float) -> None:
    """Raises InputError if the loss or the gradient of `step` is not finite and the run has to stop."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
      self._skipped_in_a_row = 0
      return
    self._skipped_in_a_row += 1
    problem, count = f"At step {step} the loss is {loss} and the gradient norm {grad_norm}", self._skipped_in_a_row
    continues = self.config.train.on_nonfinite == "skip" and count < self.config.train.max_skipped
    fix = "resume with a lower train.optimizer.learning_rate or clip_norm, or start over with a longer warm-up"
    require(continues, f"{problem} ({count} such steps in a row), so training stopped, and saved no such step: {fix}.")
    distributed.log(f"{problem}: the update was skipped.")

  def _evaluate(self, params, step: int) -> dict | None:
    """Scores the saved `step`, logs the metrics, and draws samples; returns None after a signal or a failure.

    A failure is raised at the last step alone: a run that ended here would end here again after every restart.
    """
    result, is_last = None, step >= self.config.train.steps
    try:
      result = self.evaluator(params, step, self.signals.agree)
    except Exception as error:
      if is_last and isinstance(error, TransientError):
        raise
      reason = _explain(error)
      if is_last:
        problem = f"Training is complete and step {step} is saved, but its evaluation failed: {reason}"
        raise InputError(f"{problem} Score it with --mode=eval, or run the same command again.") from error
      # On every process: the cause may be known to one alone.
      warning = f"Warning: The evaluation of step {step} failed, and training continues without it: {reason}"
      warn_once.warn_once(None, warning)
    if result:
      distributed.log(self.evaluator.describe(result))
      if not self._has_metrics(step):
        self.log.write(step, {f"eval_{name}": value for name, value in result.items() if isinstance(value, float)})
        self.log.flush()
        self.checkpointer.add_metrics(step, {"nats_per_token": result["nats_per_token"]})
        if self.preview and not self.signals.agreed:
          distributed.log("Drawing samples for TensorBoard (--config.eval.num_samples=0: none).")
          try:
            self.log.write_samples(step, write.preview(self.preview, params, self.signals.agree))
          except Exception as error:
            warn_once.warn_once(None, f"Warning: No samples of step {step} were drawn: {_explain(error)}")
    self._last_fetch = time.monotonic()
    return result

  def _has_metrics(self, step: int) -> bool:
    """Whether the saved `step` was evaluated; agreed on, since another process may write its metrics any moment."""
    return bool(distributed.maximum(self.checkpointer.has_metrics(step)))


def _explain(error: Exception) -> str:
  """Returns the error's message; prints the traceback of an error that is not an InputError.

  Raises `error` again unless every process has it, as all InputErrors of evaluation: the others would wait for this.
  """
  if isinstance(error, InputError):
    return str(error)
  if jax.process_count() > 1:
    raise error
  traceback.print_exception(error)
  return f"{type(error).__name__}: {checks.one_line(error)} (see the traceback above)."


class Signals(contextlib.AbstractContextManager):
  """A context that remembers the first signal that ends a run; a second one has its usual effect.

  SIGUSR1 comes from batch schedulers that announce a time limit, SIGHUP from a terminal that closes. A second SIGHUP is
  ignored: a shell whose terminal closes sends one in addition to the kernel's. With nohup, SIGHUP remains ignored.
  """

  def __init__(self):
    self.received = 0  # the signal that this process received
    self.agreed = 0  # the signal that any process received, as of the last call of `agree`
    self._maximum = distributed.delayed_maximum()

  def agree(self, wait: bool = False) -> int:
    """Updates and returns `agreed`; all processes call it at the same steps, so they stop at the same step.

    Without `wait`, it includes the signals received before the previous call.
    """
    self.agreed = self.agreed or (distributed.maximum if wait else self._maximum)(self.received)
    return self.agreed

  @property
  def name(self) -> str:
    return signal.Signals(self.agreed or self.received).name

  def __enter__(self) -> "Signals":
    self._handlers_before = {
      number: signal.signal(number, self._remember)
      for number in _HANDLED
      if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._handlers_before.items():
      signal.signal(number, handler)

  def _remember(self, number: int, frame) -> None:
    self.received, is_hangup = number, number == signal.SIGHUP
    signal.signal(number, signal.SIG_IGN if is_hangup else self._handlers_before[number])
    again = "" if is_hangup else " A second one ends the run at once, without saving."
    messages = {_STDERR: f"\n{self.name}: stopping after this step.{again}\n"} | ({_STDOUT: "\n"} if is_hangup else {})
    for stream, message in messages.items():
      try:
        os.write(stream, message.encode())  # print is not reentrant, and a handler runs anywhere
      except OSError:  # the terminal has closed: an error in print would end the run unsaved
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
