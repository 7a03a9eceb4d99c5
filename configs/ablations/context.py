"""Does a longer context lower the loss, at equal latents?

Paper (section 5 and appendix): on WikiText-103 test perplexity falls from 18.52 to 18.25 as the context grows from
1,024 to 4,096 tokens, on the Books corpus from 14.88 to 14.56 between 1,024 and 16,384, with 1,024 latents each.

Here: bytes of Python's standard library, whole files held out, 256 latents, the same targets and equally many steps for
each context. On a pod: give pg19's settings in this file's place of text_files'.
"""

from configs import text_files

VARIANTS = {
  "256": "as many inputs as latents: a plain Transformer",
  "1024": "256 latents of 1,024 inputs",
  "4096": "256 latents of 4,096 inputs",
}


def get_config(variant="4096"):
  config = text_files.get_config()
  config.model.update(max_context=int(variant), rotary_max_wavelength=4096)
  config.data.min_crop = 257
  config.train.update(steps=800, batch_size=4, checkpoint_every=400)
  config.train.optimizer.update(learning_rate=2e-3, warmup_steps=50, end_learning_rate=1e-4)
  config.eval.update(batch_size=4, stride=128, every=200, max_sequences=3, num_samples=0)
  return config
