"""MAESTRO v3: piano performances as Music Transformer events.

Reproduces: the paper's symbolic music model: 12 layers, 2,048 latents, context 4,096, rotary positions on a quarter of
  each head, 1 cross head, 4 self heads, cross-attention dropout 0.7, constant rate 1e-4, a million steps, no
  augmentation.
Published: 1.90 nats per event on the validation and 1.91 on the test split (v1, configs/maestro_v1.py: 1.82 and 1.82).
Not published: width and batch; the values here are our choice.
Cost: 166M parameters; days on accelerators.
Data: the unpacked release (maestro-v3.0.0.csv and its folders) in --config.data.data_dir.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=391,
    max_context=4096,
    num_latents=2048,
    num_layers=12,
    latent_width=1024,
    num_cross_heads=1,
    num_self_heads=4,
    position_encoding="rotary",
    rotary_fraction=0.25,
    cross_attend_dropout=0.7,
    dropout=0.1,
    dtype="bfloat16",
  )
  config.data.update(task="maestro_v3", min_crop=2048)
  config.train.update(steps=1_000_000, batch_size=32, log_every=100, checkpoint_every=2000)
  config.train.optimizer.update(learning_rate=1e-4, warmup_steps=1000)
  config.eval.update(batch_size=32, stride=1024, every=5000)
  return config
