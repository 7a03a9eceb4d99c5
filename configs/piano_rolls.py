"""Piano rolls: JSB Chorales, Nottingham, MuseData or Piano-midi.de, scored in nats per frame as TCNs are.

Reproduces no published model: it makes the benchmark of Boulanger-Lewandowski et al. (2012) available. Give your copy:
--config.data.files=JSB_Chorales.mat. Score the test split: --mode=eval --config.eval.split=test
Measured, JSB Chorales: 5.04 nats per frame on the validation split, 5.14 on the test split after 500 steps; a TCN has
8.10 on the latter (Bai et al., 2018, table 1). Nottingham: 2.68 on the test split (TCN: 3.07) after 300 steps with
--config.train.steps=300 --config.train.optimizer.decay_steps=200 --config.model.dropout=0.1
Cost: 1.0M parameters, 11 minutes on one core that other programs shared.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=92,
    max_context=512,
    num_latents=384,
    num_layers=4,
    latent_width=128,
    num_cross_heads=4,
    num_self_heads=4,
    position_encoding="rotary",
    dropout=0.2,
    conv_taps=2,
    qk_norm=True,
    zero_init=True,
  )
  config.data.update(task="piano_rolls", min_crop=256, max_transposition=6)
  config.train.update(steps=500, batch_size=8, log_every=10, checkpoint_every=250)
  config.train.optimizer.update(
    name="muon", learning_rate=3e-3, warmup_steps=50, schedule="wsd", decay_steps=300, b2=0.98
  )
  config.eval.update(batch_size=8, stride=384, every=250)
  return config
