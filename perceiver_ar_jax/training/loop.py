"""The training run: from a config and a workdir to trained weights, through stops of every kind.

The same command starts a run and goes on with it. What makes resuming exact: batches, random keys and
updates are functions of the seed, the data position and the step, and these are saved together.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data.global_batch import HostBatches, to_global
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.models.attention_kernels import check_platform
from perceiver_ar_jax.parallel import chips, distributed, flops, sharding
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh, rows_of_processes
from perceiver_ar_jax.training import checkpoint, metrics_log
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import step as step_lib
from perceiver_ar_jax.training import workdir as workdir_lib

_LESS_MEMORY = (
  "Lower train.batch_size or raise train.microbatches (temporary memory), set model.remat=full (activations) or"
  " model.attention=streamed (a long context), spread weights over more devices with mesh.fsdp, or make"
  " the model smaller (latent_width, num_layers, num_latents)."
)
_PROFILED_STEPS = 3


class Evaluator(Protocol):
  """Scores held-out data; evaluation/evaluate.py has the real one."""

  def __call__(self, params, step: int, should_stop: Callable[[], bool]) -> dict | None: ...

  def describe(self, result: dict) -> str: ...

  def write(self, result: dict, workdir: epath.Path) -> None: ...


Exhibit = Callable[[dict, Callable[[], bool]], Sequence[str | np.ndarray]]
"""(params, should_stop) -> samples of the model to look at; sampling/write.py has the real one."""


def train(
  config: Config,
  workdir: epath.PathLike,
  make_evaluator: Callable[[Config, Mesh], Evaluator],
  make_exhibit: Callable[[Config, Mesh], Exhibit] | None = None,
) -> int:
  """Trains to `config.train.steps`, going on from the newest good checkpoint; returns the exit code.

  0: done. 128 + signal number: SIGTERM or SIGINT came, everything is saved, and the same command goes on.

  Raises:
    InputError: the config does not fit the data, the devices, their memory or the workdir; another run is in the
      workdir; or the loss is no longer finite. Checkpoints stay as they are.
    TransientError: the disk is full or storage out of reach; the same command resumes once that has passed.
  """
  workdir, startup = epath.Path(workdir), _Startup()
  mesh = make_mesh(config.mesh)
  startup.done("devices")
  check_platform(config.model.attention, mesh)
  if config.train.microbatches > 1:
    check_batch(config.train.batch_size // config.train.microbatches, "train.batch_size / train.microbatches", mesh)
  check_batch(config.train.batch_size, "train.batch_size", mesh)
  evaluator = make_evaluator(config, mesh)
  exhibit = make_exhibit(config, mesh) if make_exhibit and config.eval.num_samples else None
  data = HostBatches(config, rows_of_processes(mesh, config.train.batch_size), jax.process_index())
  startup.done("data")

  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = state_lib.abstract_state(config, optimizer, mesh)
  distributed.say(parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
  with workdir_lib.own(config, workdir) as check_owner, _Signals() as signals, jax.set_mesh(mesh):
    _check_least_memory(config, abstract, mesh)
    train_step = _compile(config, optimizer, abstract, data.spec, mesh)
    startup.done("compilation")
    keep = config.train.keep_checkpoints
    with checkpoint.Checkpointer(workdir, keep=keep, before_save=check_owner) as checkpointer:
      state = checkpointer.restore(abstract, data)
      if state is None:
        state = state_lib.init_state(config, optimizer, mesh)
      else:
        distributed.say(f"Going on from the checkpoint of step {int(state.step)}.")
      jax.block_until_ready(state)
      startup.done("weights")
      distributed.say(startup.describe())
      if signals.wait_and_agree():
        distributed.say(f"{signals.name}: stopped at step {int(state.step)}, where it began.")
        return 128 + signals.agreed
      with _make_log(config, workdir, int(state.step), data.task) as log:
        run = _Run(config, workdir, mesh, train_step, evaluator, exhibit, checkpointer, signals, log)
        state, result = run(state, data)
  if signals.agreed:
    distributed.say(f"{signals.name}: saved at step {int(state.step)}; the same command goes on from there.")
    return 128 + signals.agreed
  result = result or evaluator(state.params, int(state.step), lambda: False)
  evaluator.write(result, workdir)
  distributed.say(
    f"Done. {evaluator.describe(result)}\nCurves: {epath.Path(sys.executable).with_name('tensorboard')}"
    f" --logdir={workdir}   Figures: {workdir}/metrics.jsonl   Score again: --workdir={workdir} --mode=eval"
  )
  return 0


class _Run:
  """The loop proper, with all that a step touches."""

  def __init__(self, config, workdir, mesh, train_step, evaluator, exhibit, checkpointer, signals, log):
    self._config = config
    self._mesh = mesh
    self._train_step = train_step
    self._schedule = optimizer_lib.make_schedule(config.train.optimizer, config.train.steps)
    self._evaluator = evaluator
    self._exhibit = exhibit
    self._checkpointer = checkpointer
    self._signals = signals
    self._log = log
    self._profile = _Profile(config.train.profile_at, workdir / "profile")
    self._key = jax.random.fold_in(jax.random.key(config.seed), 1)  # weights are drawn from the key itself
    self._skipped = self._skipped_in_a_row = 0
    self._step_flops = flops.train_step(config).useful
    self._chip = chips.of_device(mesh.devices.flat[0].device_kind)

  def __call__(self, state: state_lib.TrainState, data: HostBatches):
    """(the last state, the evaluation at the last step or None), after the last step or a signal."""
    train, first = self._config.train, int(state.step) + 1
    result, pending, self._last_report = None, None, time.monotonic()
    shardings = sharding.batch_shardings(self._mesh, {name: array.shape for name, array in data.spec.items()})
    if (
      1 < first <= train.steps
      and (first - 1) % self._config.eval.every == 0
      and not self._checkpointer.evaluated(first - 1)
    ):
      self._evaluate(state.params, first - 1)  # owed: a signal had cut it short
    for step in range(first, train.steps + 1):
      # Dispatch is asynchronous: while the device works on a step, the host reads, checks and transfers the next
      # batch. Nothing is drawn ahead of its step, so `data` always stands where `state` does.
      self._profile.before(step)
      begin = time.monotonic()
      batch = to_global(next(data), data.rows, train.batch_size, shardings)
      data_seconds = time.monotonic() - begin
      waited = pending is None or all(value.is_ready() for value in pending[1].values())
      state, metrics = self._train_step(state, batch, jax.random.fold_in(self._key, step))
      self._profile.after(step, metrics)
      if pending:
        self._report(*pending)  # a step late: the device never waits for the host
      pending = step, metrics, {"data_seconds": data_seconds, "data_wait_seconds": data_seconds * waited}
      last, stop = step == train.steps, bool(self._signals.agree())
      evaluate = last or step % self._config.eval.every == 0
      if evaluate or stop or step % train.checkpoint_every == 0:
        self._report(*pending)  # before saving: what is not finite is never saved
        pending, result = None, None
        if evaluate:
          result = self._evaluate(state.params, step)
          stop = bool(self._signals.agreed)
        self._log.flush()
        self._checkpointer.save(state, data, result and {"nats_per_token": result["nats_per_token"]})
      if stop:
        break
    return state, result

  def _report(self, step: int, metrics: dict[str, jax.Array], host_seconds: dict[str, float]) -> None:
    """Shows a finished step, and writes it if it is one to be logged; raises InputError for loss that is not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    seconds, self._last_report = now - self._last_report, now
    train, finite = self._config.train, math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    self._skipped += not finite
    self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
    if not finite and train.on_nonfinite == "skip" and self._skipped_in_a_row < train.max_skipped:
      self._log.say(f"Step {step} was skipped: its loss is {values['loss']}, its gradient norm {values['grad_norm']}.")
    elif not finite:
      times = f", {self._skipped_in_a_row} steps in a row" if self._skipped_in_a_row > 1 else ""
      raise InputError(
        f"At step {step} the loss is {values['loss']} and the gradient norm {values['grad_norm']}{times}, so training"
        " stopped. The checkpoints before it are kept as they are: go on from the newest with a lower"
        " --config.train.optimizer.learning_rate or --config.train.optimizer.clip_norm (or begin anew with a longer"
        " warm-up, or in float32)."
      )
    if train.on_nonfinite == "skip":
      values["skipped_steps"] = self._skipped
    tokens_per_second = values["num_tokens"] / seconds
    self._log.progress(values["loss"], tokens_per_second)
    if step % self._config.train.log_every == 0:
      rate = float(self._schedule(step - 1))
      figures = {"seconds": seconds, **host_seconds, **values, **self._utilization(seconds)}
      self._log.write(step, {**figures, "learning_rate": rate, "tokens_per_second": tokens_per_second})

  def _utilization(self, seconds: float) -> dict[str, float]:
    """FLOP/s of all devices at a step of this duration, and their share of the peak where that is known."""
    flops_per_second = self._step_flops / seconds
    result = {"model_flops_per_second": flops_per_second}
    if self._chip:
      result["model_flops_utilization"] = flops_per_second / (self._mesh.size * self._chip.peak_flops)
    return result

  def _evaluate(self, params, step: int) -> dict | None:
    """The evaluation's figures, shown and logged, with some samples; None if a signal came meanwhile."""

    def stopped():
      return bool(self._signals.agree())

    result = self._evaluator(params, step, stopped)
    if result:
      self._log.say(self._evaluator.describe(result))
      figures = {f"eval_{name}": value for name, value in result.items() if isinstance(value, float)}
      self._log.write(step, figures)
      self._log.flush()
      if self._exhibit:
        self._log.say("Drawing samples for TensorBoard (--config.eval.num_samples=0: none).")
        self._log.write_samples(step, self._exhibit(params, stopped))
    self._last_report = time.monotonic()
    return result


class _Startup:
  """How long the phases before the first step took."""

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


def _make_log(config: Config, workdir: epath.Path, first_step: int, task: Task):
  """Where this process's figures go: one of the processes writes them."""
  if jax.process_index():
    return metrics_log.NoLog()
  bits_name = "bits/dim" if task.unit == "bits_per_dim" else "bits/token"
  settings = {
    name: value
    for name, value in workdir_lib.flatten(config).items()
    if name.startswith(("model.", "train.")) and isinstance(value, (bool, int, float, str))
  }
  return metrics_log.MetricsLog(
    workdir, first_step=first_step, total_steps=config.train.steps, bits_name=bits_name, settings=settings
  )


class _Profile:
  """A jax.profiler trace of a few steps, if the config asks for one."""

  def __init__(self, first: int | None, directory: epath.Path):
    self._first, self._directory, self._active = first, directory, False

  def before(self, step: int) -> None:
    if step == self._first:
      jax.profiler.start_trace(str(self._directory))
      self._active = True

  def after(self, step: int, metrics) -> None:
    if self._active and step >= self._first + _PROFILED_STEPS - 1:
      jax.block_until_ready(metrics)
      jax.profiler.stop_trace()
      self._active = False


class _Signals:
  """Remembers the first SIGTERM or SIGINT (Ctrl-C); a second one acts as it always does."""

  def __init__(self):
    self.received = 0
    """The signal that came to this process."""
    self.agreed = 0
    """The signal that came to any process, as of the last time that all of them looked together."""
    self._largest = distributed.LargestSoFar()

  def agree(self) -> int:
    """`agreed`, brought up to date; all processes call it at the same steps, so they stop at the same one."""
    self.agreed = self.agreed or self._largest(self.received)
    return self.agreed

  def wait_and_agree(self) -> int:
    """The same, up to this moment."""
    self.agreed = distributed.largest(self.received)
    return self.agreed

  @property
  def name(self) -> str:
    return signal.Signals(self.agreed or self.received).name

  def __enter__(self) -> "_Signals":
    self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _remember(self, number: int, frame) -> None:
    del frame
    self.received = number
    signal.signal(number, self._before[number])
    note = f"\n{self.name}: stopping. Once more: at once, without saving.\n"
    os.write(sys.stderr.fileno(), note.encode())  # print may not run inside itself, and a handler runs anywhere


def _compile(config: Config, optimizer, abstract: state_lib.TrainState, batch_spec: dict, mesh: Mesh):
  """The compiled update for these shapes, the state donated; says what memory it takes.

  Raises:
    InputError: it does not fit into the devices' memory.
  """
  shardings = sharding.batch_shardings(mesh, {name: spec.shape for name, spec in batch_spec.items()})
  batch = {
    name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name]) for name, spec in batch_spec.items()
  }
  start = time.monotonic()
  try:
    compiled = step_lib.lower(config, optimizer, abstract, batch, mesh).compile()
  except jax.errors.JaxRuntimeError as error:  # the TPU's compiler refuses by itself what cannot fit
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise InputError(f"The train step does not fit into the devices' memory. {_LESS_MEMORY}") from error
  memory = compiled.memory_analysis()
  new_outputs = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
  needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new_outputs
  available = _memory_per_device()
  distributed.say(
    f"Compiled the train step in {time.monotonic() - start:.1f} s. Each of {mesh.size} devices holds"
    f" {_size(memory.argument_size_in_bytes)} of weights, optimizer state and batch, and works in"
    f" {_size(memory.temp_size_in_bytes)}; it has {_size(available)}."
  )
  if needed > available:
    raise InputError(
      f"The train step needs {_size(needed)} on each device, and each has {_size(available)}. {_LESS_MEMORY}"
    )
  return compiled


def _check_least_memory(config: Config, abstract: state_lib.TrainState, mesh: Mesh) -> None:
  """Raises InputError if not even weights, optimizer state, gradients and what each layer reads would fit.

  XLA's own count is exact but needs a compilation, which may crash for shapes far beyond what any machine has.
  """
  model, rows = config.model, config.train.batch_size // config.train.microbatches // mesh.size
  latents = rows * model.num_latents * model.latent_width * jnp.dtype(model.dtype).itemsize
  least = sharding.bytes_per_device(abstract) + sharding.bytes_per_device(abstract.params) + model.num_layers * latents
  available = _memory_per_device()
  if least > available:
    raise InputError(
      f"The train step needs at least {_size(least)} on each device, and each has {_size(available)}. {_LESS_MEMORY}"
    )


def _size(num_bytes: int) -> str:
  return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _memory_per_device() -> int:
  """Bytes that a local device may use; CPU devices share what the machine has left."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or psutil.virtual_memory().available // jax.local_device_count()
