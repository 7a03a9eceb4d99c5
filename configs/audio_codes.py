"""Codes of a neural audio codec (SoundStream, EnCodec, DAC, ...), from .npy or .npz files of frames x levels.

Reproduces: the paper's audio experiments in outline: residual codes flattened frame by frame, 1,024 codes per level,
  12 layers, 1,024 latents, context 8,192 to 65,536, rotary positions. The paper has 24 codes per frame at 12 kbps, 36
  at 18, 44 at 22 (--config.data.code_levels); its codec is not public.
Published: 2.49 nats per code on the validation and 2.34 on the test split, at 12 kbps and context 65,536.
Cost: 215M parameters; days on accelerators.
Your files: --config.data.files=folder --config.data.code_levels=8 --config.data.codebook_size=1024, and
  --config.model.vocab_size set to code_levels * codebook_size + 3. For files of levels x frames, add
  --config.data.code_layout=levels_frames.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=24 * 1024 + 3,
    max_context=65_536,
    num_latents=1024,
    num_layers=12,
    latent_width=1024,
    num_cross_heads=16,
    num_self_heads=16,
    position_encoding="rotary",
    positions_from_data=False,
    cross_attend_dropout=0.5,
    dropout=0.1,
    logits_chunk=128,
    dtype="bfloat16",
  )
  config.data.update(task="audio_codes", code_levels=24, codebook_size=1024, min_crop=8192)
  config.train.update(steps=500_000, batch_size=128, log_every=100, checkpoint_every=2000)
  config.train.optimizer.update(learning_rate=1e-4, warmup_steps=1000)
  config.eval.update(batch_size=32, every=5000)
  return config
