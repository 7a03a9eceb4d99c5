"""Does a longer context lower the loss, at equal latents?

Paper (section 5 and appendix): on WikiText-103 test perplexity falls from 18.52 to 18.25 as the context grows from
1,024 to 4,096 tokens, on the Books corpus from 14.88 to 14.56 between 1,024 and 16,384, with 1,024 latents each.

Here: the source code of Python's standard library in 2,000 subword tokens, with held-out files, 64 latents, the same
targets and equally many steps for each context; evaluation windows advance by 32 tokens. Each run had one core. (The
vocabulary, python.model, was trained by `python -m perceiver_ar_jax.data.train_sentencepiece
--config=configs/text_files.py --vocab_size=2000 --output=python.model`.) At full scale: configs/pg19.py or
configs/wikitext103.py with --config.model.max_context.

Result: trained with 512 inputs the model ends 0.9% below that with 64 (0.8% and 1.0% with the two seeds); 256 inputs
are 0.2% above. A single model, trained with 512 and evaluated with fewer inputs, loses 4.6% with 64, 1.4% with 128 and
0.4% with 256 ("One model..." in results.md). The gain of a context appears late: 0.3% after 500 steps, 0.5% after
1,000. So a context that is long relative to the training gains nothing: with 256 latents, 3,000 steps and one seed,
256, 1,024 and 4,096 inputs gave 1.556, 1.550 and 1.577 bits per byte.
"""

import pathlib

from configs import text_files

VARIANTS = {
  "64": "as many inputs as latents: a plain Transformer",
  "256": "64 latents of 256 inputs",
  "512": "64 latents of 512 inputs",
}


def get_config(variant="512"):
  config = text(int(variant), steps=2000)
  config.model.num_latents = 64
  config.data.min_crop = 65
  config.train.batch_size = 16
  config.eval.update(batch_size=16, stride=32)
  return config


def text(max_context, steps):
  """Returns the text, model and training that all ablations on text share; the others have 256 latents."""
  config = text_files.get_config()
  config.model.update(vocab_size=2003, max_context=max_context, num_latents=256, num_layers=4)
  config.model.update(num_cross_heads=4, num_self_heads=4, rotary_max_wavelength=4096)
  config.model.update(conv_taps=0, qk_norm=False, zero_init=False)
  config.data.update(sentencepiece=str(pathlib.Path(__file__).with_name("python.model")), min_crop=257)
  config.train.update(steps=steps, batch_size=4, checkpoint_every=steps // 2)
  config.train.optimizer.update(name="adam", learning_rate=2e-3, warmup_steps=50, b2=0.999)
  config.train.optimizer.update(schedule="cosine", decay_steps=None, end_learning_rate=1e-4)
  config.eval.update(batch_size=4, stride=128, every=steps // 4, max_sequences=6, num_samples=0)
  return config
