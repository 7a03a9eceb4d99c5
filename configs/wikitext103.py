"""WikiText-103: Wikipedia articles.

Reproduces: the paper's WikiText-103 model: 1,024 latents, context 8,192 (also 1,024 to 4,096:
  --config.model.max_context), 18 layers, rotary positions, strong cross-attention dropout.
Published: test perplexity 18.52, 18.35, 18.25, 18.37 at context 1,024, 2,048, 4,096, 8,192; validation 17.58.
Not published: vocabulary, batch, schedule, rate of the dropout; the values here are our choice.
Cost: 306M parameters; days on accelerators.
Data: your unpacked copy of the raw release (wiki.train.raw and its siblings) in --config.data.data_dir, and a
  SentencePiece model trained on it (docs/data.md).
"""

from configs import pg19


def get_config():
  config = pg19.get_config()
  config.model.update(max_context=8192, num_layers=18, embed_width=None, num_cross_heads=16, cross_attend_width=None)
  config.data.update(task="wikitext103", sentencepiece="wikitext103.model")
  config.train.update(steps=100_000, batch_size=512)
  config.train.optimizer.update(warmup_steps=5000, cosine_steps=25_000)
  return config
