"""Piano rolls: JSB Chorales, Nottingham, MuseData or Piano-midi.de, scored in nats per frame as TCNs are.

Reproduces no published model: it makes the benchmark of Boulanger-Lewandowski et al. (2012) available. Give your copy:
--config.data.files=JSB_Chorales.mat. Score the test split: --mode=eval --config.eval.split=test
Measured on the test splits: JSB Chorales 4.84 nats per frame after 500 steps, Nottingham 2.25 and Piano-midi.de 5.75
as well, MuseData 5.39 after 1,000 (--config.train.steps=1000 --config.train.optimizer.decay_steps=600). A TCN has 8.10
and 3.07 on the first two (Bai et al., 2018, table 1), an RNN-NADE 5.56, 2.31, 7.05 and 5.60. On MuseData's validation
split, 500 steps with 384 latents of 8 rows end at 6.21 and 5.95 with rates of 3e-3 and 1.2e-2, 128 latents of 24 rows
at 5.82.
Cost: 1.0M parameters; 500 steps took 4 minutes on one core (AVX-512) whose other core was busy.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=92,
    max_context=512,
    num_latents=128,
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
  config.data.update(task="piano_rolls", min_crop=129, max_transposition=6)
  config.train.update(steps=500, batch_size=24, log_every=10, checkpoint_every=250)
  config.train.optimizer.update(
    name="muon", learning_rate=1.2e-2, warmup_steps=50, schedule="wsd", decay_steps=300, b2=0.98
  )
  config.eval.update(batch_size=24, stride=128, every=250)
  return config
