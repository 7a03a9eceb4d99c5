"""MAESTRO v3 on a laptop: configs/maestro_v3.py with a model of 2.4M parameters and a recipe for hours on 2 cores.

Reproduces no published model: data, split, events and unit are the paper's, model and recipe are not. Half the context,
a quarter of the latents, four layers, convolutions of keys and values, Muon, warm-up, constant rate and linear decay,
no dropout (all steps together see less than the training split once). For comparison: the paper's 166M parameters
after a million steps have 1.90 nats per event on the validation split, and the frequencies of events alone 4.90.
Evaluations in training score the first 65,536 events of the validation split. All 1.6M of them, afterwards:
--mode=eval --config.eval.max_tokens=None
Measured: 2.420 nats per event on 107 of the 137 validation performances after half of the steps of this file, with
  --config.train.steps=3000 --config.train.optimizer.decay_steps=1500. On its first 65,536 events, which are harder,
  3.10, 2.89, 2.80, 2.71, 2.62, 2.57 nats after 500, 1,000, ..., 3,000 steps.
Cost: 2.4M parameters; 3,000 steps took 1.9 hours on one core: 6.1M targets, 2.2 seconds per step.
Data: the unpacked release (maestro-v3.0.0.csv and its folders) in --config.data.data_dir.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=391,
    max_context=2048,
    num_latents=512,
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
  config.data.update(task="maestro_v3", min_crop=513)
  config.train.update(steps=6000, batch_size=4, log_every=10, checkpoint_every=200)
  config.train.optimizer.update(
    name="muon", learning_rate=3e-3, warmup_steps=100, schedule="wsd", decay_steps=3000, b2=0.98
  )
  config.eval.update(batch_size=4, stride=512, every=500, max_tokens=65_536, num_samples=0)
  return config
