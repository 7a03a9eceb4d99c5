"""tinyshakespeare as bytes: the 1,115,394 characters of nanoGPT's character-level benchmark, split 90 / 10.

Reproduces no published model. For comparison, nanoGPT: 1.88 nats per character after 2,000 iterations of 12 x 64 on
a CPU, 1.4697 with its GPU configuration. Give your copy: --config.data.files=input.txt
Measured: 1.529 nats per character (2.206 bits per byte) after 1,000 steps, 1.54M targets.
  configs/tinyshakespeare.py:large, 12.3M targets: 1.455 (2.100); 65 minutes on one core (AVX-512), the other was busy.
  configs/tinyshakespeare.py:quick, 1.29M targets: 1.564 (2.256) in 187 s on 2 cores, start, compilation and evaluation
  included; 1.567 and 1.591 at two and four times its learning rate. nanoGPT's run on a CPU took 187 s on the same cores
  and ended at 1.886, with 1.54M targets.
Cost: 1.7M parameters, 28 minutes on one core that other programs shared; large: 3.3M parameters.
"""

from perceiver_ar_jax import config as config_lib


def get_config(variant="long"):
  config = config_lib.defaults()
  config.model.update(
    vocab_size=259,
    max_context=512,
    num_latents=256,
    num_layers=4,
    latent_width=160,
    num_cross_heads=5,
    num_self_heads=5,
    position_encoding="rotary",
    conv_taps=2,
    qk_norm=True,
    zero_init=True,
  )
  config.data.update(task="text_files", split_by="position", validation_fraction=0.1, min_crop=257)
  config.train.update(steps=1000, batch_size=6, log_every=10, checkpoint_every=250)
  config.train.optimizer.update(
    name="muon", learning_rate=4e-3, warmup_steps=50, schedule="wsd", decay_steps=400, b2=0.98
  )
  config.eval.update(batch_size=16, stride=256, every=500)
  if variant == "large":
    config.model.update(max_context=256, num_latents=128, num_layers=6, latent_width=192, dropout=0.15)
    config.model.update(num_cross_heads=3, num_self_heads=3)
    config.data.min_crop = 129
    config.train.update(steps=6000, batch_size=16, log_every=20, checkpoint_every=500)
    config.train.optimizer.update(warmup_steps=100, decay_steps=3000)
    config.eval.update(batch_size=32, stride=64, every=1000)
  if variant == "quick":
    # Twice as many targets per second as with 4 layers of this width and 256 latents of 512 inputs: what counts here.
    config.model.update(max_context=128, num_latents=64, num_layers=2, latent_width=128)
    config.model.update(num_cross_heads=2, num_self_heads=2)
    config.data.min_crop = 65
    config.train.update(steps=630, batch_size=32, checkpoint_every=630)
    config.train.optimizer.update(learning_rate=8e-3, warmup_steps=20, decay_steps=395)
    config.eval.update(batch_size=32, stride=32, every=630, num_samples=0)
  return config
