"""PG-19: books published before 1919, the paper's long-document text experiment.

Reproduces: the paper's PG-19 model: 60 layers, 1,024 latents, context 2,048 (also 4,096:
  --config.model.max_context=4096), rotary positions, embedding width 4,096, 128 cross heads, cross-attention
  dropout, batch 2,048, about 200,000 steps, SentencePiece with 32,000 subword tokens.
Published: word perplexity 45.9 on the validation and 28.9 on the test split, at context 2,048.
Not published: the rate of cross-attention dropout (only a range, 0.875 to 0.97), the schedule, and the width of the
  cross-attention; the values here are our choice.
Cost: 974M parameters; days on a pod of accelerators.
Data: the TFDS builder pg19, prepared in --config.data.data_dir, and a SentencePiece model trained on it (docs/data.md).
  To read bytes: --config.data.sentencepiece=None --config.model.vocab_size=259.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=32_003,
    max_context=2048,
    num_latents=1024,
    num_layers=60,
    latent_width=1024,
    embed_width=4096,
    num_cross_heads=128,
    cross_attend_width=4096,
    num_self_heads=16,
    position_encoding="rotary",
    cross_attend_dropout=0.875,
    dropout=0.1,
    logits_chunk=128,
    remat="full",
    dtype="bfloat16",
  )
  config.data.update(task="pg19", sentencepiece="pg19.model", min_crop=1024)
  config.train.update(steps=200_000, batch_size=2048, loss_reduction="sum", log_every=100, checkpoint_every=5000)
  config.train.optimizer.update(learning_rate=3e-4, warmup_steps=10_000, schedule="cosine", cosine_steps=50_000)
  config.eval.update(batch_size=512, stride=512, every=10_000)
  config.mesh.update(data=1, fsdp=-1)
  return config
