"""Measures the training step of the original release (Haiku), and prints the same fields as step.py; or its sampler.

Runs in an environment of its own, which run.py --peers official creates, on a checkout of the release,
github.com/google-research/perceiver-ar:

  python benchmarks/peer_official.py --path=CHECKOUT --context=8192
  python benchmarks/peer_official.py --path=CHECKOUT --context=8192 --generate=512

Sizes and optimizer are those of point_a.py, and the loss is the release's. Three names that JAX has removed since are
restored first.
"""

import argparse
import functools
import json
import resource
import statistics
import sys
import time

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax


def _restore_old_names():
  argsort = jnp.argsort
  jnp.DeviceArray = jax.Array
  jax.tree_map = jax.tree.map
  jnp.argsort = lambda *arguments, kind=None, **named: argsort(*arguments, **named)


LATENTS, WIDTH, HEADS, LAYERS, VOCAB = 256, 256, 8, 4, 259


def _network(context: int, positions_from_data: bool = False):
  """Returns the model of point A, a Haiku module; the release must be importable."""
  from perceiver_ar import perceiver_ar_model

  def forward(tokens_BxL, positions_BxLxP, **kwargs):
    model = perceiver_ar_model.PerceiverAR(
      num_classes=VOCAB,
      input_idx_size=[-1],
      max_context_length=context,
      position_encoding_type="rotary",
      input_embed_dim=WIDTH,
      num_transformers_per_block=LAYERS,
      z_index_dim=LATENTS,
      num_z_channels=WIDTH,
      num_cross_attend_heads=HEADS,
      num_transformer_heads=HEADS,
      cross_attend_widening_factor=4,
      transformer_widening_factor=4,
      dropout_prob=0.1,
      max_wavelength=max(8192, context),
      use_positions_from_data=positions_from_data,
    )
    kwargs.pop("context", None)
    return model(tokens_BxL, positions_BxLxP, **kwargs)

  return hk.transform_with_state(forward)


def _init(network, tokens_BxL, positions_BxLxP=None):
  """Returns random weights."""
  init = functools.partial(network.init, jax.random.key(0), is_training=True)
  return jax.jit(lambda *inputs: init(*inputs)[0])(tokens_BxL, positions_BxLxP)


def _generate(network, context: int, num_tokens: int, rows: int = 4) -> dict:
  """Returns milliseconds per step of the release's cached sampler, one token for each row, without compilation.

  Its cache of latents, as large as in training, begins empty, and is refilled by a full pass whenever it is full.
  """
  from perceiver_ar import sample_utils

  events = jnp.full((rows, context + 1), 3, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(1, context + 2)[:, None], (*events.shape, 1))
  memory = sample_utils.initialize_memory(rows, LAYERS, HEADS, HEADS, WIDTH, context, LATENTS, "rotary")
  params = _init(network, events[:1, :-1], positions[:1, :-1])

  @jax.jit
  def generate(params, events, memory):
    step = functools.partial(
      sample_utils.sample_position,
      forward_fn=functools.partial(network.apply, params, {}),
      condition_on="most_recent_only",
      event_idxs=positions,
      modality=None,
      temperature=1.0,
      top_p=1.0,
      use_memory=True,
    )
    return jax.lax.fori_loop(1, 1 + num_tokens, step, (events, jax.random.PRNGKey(0), memory))[0]

  start = time.perf_counter()
  compiled = generate.lower(params, events, memory).compile()
  compile_seconds = time.perf_counter() - start
  times = []
  for _ in range(2):
    start = time.perf_counter()
    jax.block_until_ready(compiled(params, events, memory))
    times.append(time.perf_counter() - start)
  return {
    "implementation": "original release",
    "context": context,
    "batch": rows,
    "tokens": num_tokens,
    "ms": min(times) / num_tokens * 1000,
    "tokens_per_second": rows * num_tokens / min(times),
    "compile_seconds": compile_seconds,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--path", required=True, help="checkout of the release")
  parser.add_argument("--context", type=int, required=True)
  parser.add_argument("--steps", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=60.0)
  parser.add_argument("--generate", type=int, default=0, help="measure the cached sampler on N tokens instead")
  arguments = parser.parse_args()
  _restore_old_names()
  sys.path.insert(0, arguments.path)
  from perceiver_ar import losses

  if arguments.generate:
    print(
      json.dumps(
        _generate(_network(arguments.context, positions_from_data=True), arguments.context, arguments.generate)
      ),
      flush=True,
    )
    return
  batch, network = 2, _network(arguments.context)

  def apply(params, key, tokens_BxL):
    output, _ = network.apply(params, {}, key, tokens_BxL, None, is_training=True)
    return output.input_events_logits

  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))

  def step(params, opt_state, key, tokens_BxL, targets_BxM):
    def loss_of(params):
      loss, *_ = losses.compute_weighted_cross_entropy(apply(params, key, tokens_BxL), targets_BxM, z_loss=1e-4)
      return loss.sum()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  rng = np.random.default_rng(0)
  tokens_BxL = rng.integers(3, VOCAB, (batch, arguments.context), np.int32)
  targets_BxM = rng.integers(3, VOCAB, (batch, LATENTS), np.int32)
  params = _init(network, tokens_BxL)
  opt_state = optimizer.init(params)
  start = time.perf_counter()
  key = jax.random.key(0)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, key, tokens_BxL, targets_BxM).compile()
  compile_seconds = time.perf_counter() - start
  times, begin = [], time.perf_counter()
  for index in range(arguments.steps + 1):
    start = time.perf_counter()
    params, opt_state, loss = compiled(params, opt_state, jax.random.key(index), tokens_BxL, targets_BxM)
    jax.block_until_ready((params, loss))
    times.append(time.perf_counter() - start)
    if time.perf_counter() - begin > arguments.seconds:
      break
  timed = times[1:] or times
  metrics = {
    "implementation": "original release",
    "version": f"jax {jax.__version__}, {jax.devices()[0].device_kind}",
    "attention": "its own",
    "context": arguments.context,
    "seconds": statistics.median(timed),
    "all_seconds": timed,
    "targets_per_second": batch * LATENTS / statistics.median(timed),
    "compile_seconds": compile_seconds,
    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "loss": float(loss),
  }
  print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
  main()
