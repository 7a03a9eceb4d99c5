"""MAESTRO v3 on a laptop: configs/maestro_v3.py with a model of 2.4M parameters and a recipe for an hour on one core.

Reproduces no published model: data, split, events and unit are the paper's, model and recipe are not. A quarter of the
context, 128 latents, four layers, convolutions of keys and values, Muon, warm-up, constant rate and linear decay, no
dropout (all steps together see less than the training split once). For comparison: the paper's 166M parameters after a
million steps have 1.90 nats per event on the validation split, and the frequencies of events alone 4.90.
Evaluations in training score the first 65,536 events of the validation split. All 1.6M of them, afterwards:
--mode=eval --config.eval.max_tokens=None
Measured: 2.366 nats per event on 107 of the 137 validation performances. On its first 65,536 events, which are harder,
  2.88, 2.77, 2.71, 2.64, 2.57, 2.52 nats after 1,000, 2,000, ..., 6,000 steps.
  After 300 steps, on these events: 512 latents of 2,048 inputs in 4 rows 3.59, 3.25 and 3.21 with rates of 3e-3, 1.2e-2
  and 2.4e-2; 128 latents of 1,024 inputs in 16 rows 3.10, 3.07 and 3.05 with 1.2e-2, 2.4e-2 and 4.8e-2.
Cost: 2.4M parameters; 6,000 steps took 53 minutes on one core (AVX-512), 12.3M targets.
Data: the unpacked release (maestro-v3.0.0.csv and its folders) in --config.data.data_dir.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=391,
    max_context=1024,
    num_latents=128,
    num_layers=4,
    latent_width=192,
    num_cross_heads=4,
    num_self_heads=4,
    position_encoding="rotary",
    conv_taps=2,
    qk_norm=True,
    zero_init=True,
    remat="none",
  )
  config.data.update(task="maestro_v3", min_crop=129)
  config.train.update(steps=6000, batch_size=16, log_every=10, checkpoint_every=200)
  config.train.optimizer.update(
    name="muon", learning_rate=3.2e-2, warmup_steps=100, schedule="wsd", decay_steps=3000, b2=0.98
  )
  config.eval.update(batch_size=16, stride=128, every=1000, max_tokens=65_536, num_samples=0)
  return config
