"""Does a longer context lower the loss, at equal latents?

Paper (section 5 and appendix): on WikiText-103 test perplexity falls from 18.52 to 18.25 as the context grows from
1,024 to 4,096 tokens, on the Books corpus from 14.88 to 14.56 between 1,024 and 16,384, with 1,024 latents each.

Here: the source code of Python's standard library in 2,000 SentencePiece pieces, whole files held out, 256 latents, the
same targets and equally many steps for each context. (The pieces, python.model, were trained by `python -m
perceiver_ar_jax.data.train_sentencepiece --config=configs/text_files.py --vocab_size=2000 --output=python.model`.) At
full scale: configs/pg19.py or configs/wikitext103.py with --config.model.max_context.

Found, at 3,000 steps and one seed: 1,024 inputs end 0.4% below 256, 4,096 inputs 1.3% above. At 600 steps, over two
seeds, the three were within 0.1% of each other. So a somewhat longer context helps a little and a long one not yet: the
paper's direction is not established here.
"""

import pathlib

from configs import text_files

VARIANTS = {
  "256": "as many inputs as latents: a plain Transformer",
  "1024": "256 latents of 1,024 inputs",
  "4096": "256 latents of 4,096 inputs",
}


def get_config(variant="4096"):
  return text(int(variant), steps=3000)


def text(max_context, steps):
  """The experiment on text that the other ablations change one thing of."""
  config = text_files.get_config()
  config.model.update(vocab_size=2003, max_context=max_context, rotary_max_wavelength=4096)
  config.data.update(sentencepiece=str(pathlib.Path(__file__).with_name("python.model")), min_crop=257)
  config.train.update(steps=steps, batch_size=4, checkpoint_every=steps // 2)
  config.train.optimizer.update(learning_rate=2e-3, warmup_steps=50, end_learning_rate=1e-4)
  config.eval.update(batch_size=4, stride=128, every=steps // 4, max_sequences=6, num_samples=0)
  return config
