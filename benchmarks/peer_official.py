"""Measures the training step of the official release (Haiku), and prints the same fields as step.py.

Runs in an environment of its own, which run.py --peers official creates, on a checkout of the release,
github.com/google-research/perceiver-ar:

  python benchmarks/peer_official.py --path=CHECKOUT --context=8192

Sizes and optimizer are those of point_a.py, and the loss is the release's. Three names that JAX has removed since are
restored first.
"""

import argparse
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


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--path", required=True, help="checkout of the release")
  parser.add_argument("--context", type=int, required=True)
  parser.add_argument("--steps", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=60.0)
  arguments = parser.parse_args()
  _restore_old_names()
  sys.path.insert(0, arguments.path)
  from perceiver_ar import losses, perceiver_ar_model

  batch, latents, width, heads, vocab = 2, 256, 256, 8, 259

  def logits(tokens_BxL):
    model = perceiver_ar_model.PerceiverAR(
      num_classes=vocab,
      input_idx_size=[-1],
      max_context_length=arguments.context,
      position_encoding_type="rotary",
      input_embed_dim=width,
      num_transformers_per_block=4,
      z_index_dim=latents,
      num_z_channels=width,
      num_cross_attend_heads=heads,
      num_transformer_heads=heads,
      cross_attend_widening_factor=4,
      transformer_widening_factor=4,
      dropout_prob=0.1,
      max_wavelength=max(8192, arguments.context),
    )
    return model(tokens_BxL, None, is_training=True).input_events_logits

  network = hk.transform(logits)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))

  def step(params, opt_state, key, tokens_BxL, targets_BxM):
    def loss_of(params):
      loss, *_ = losses.compute_weighted_cross_entropy(network.apply(params, key, tokens_BxL), targets_BxM, z_loss=1e-4)
      return loss.sum()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  rng = np.random.default_rng(0)
  tokens_BxL = rng.integers(3, vocab, (batch, arguments.context), np.int32)
  targets_BxM = rng.integers(3, vocab, (batch, latents), np.int32)
  params = jax.jit(network.init)(jax.random.key(0), tokens_BxL)
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
    "implementation": "official release",
    "version": f"jax {jax.__version__}, {jax.devices()[0].device_kind}",
    "attention": "its own",
    "context": arguments.context,
    "seconds": statistics.median(timed),
    "all_seconds": timed,
    "targets_per_second": batch * latents / statistics.median(timed),
    "compile_seconds": compile_seconds,
    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "loss": float(loss),
  }
  print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
  main()
