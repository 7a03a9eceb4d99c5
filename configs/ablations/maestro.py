"""On piano performances: does a longer context pay, what is the recipe worth, and does a plain Transformer do as well?

Paper: with 2,048 latents of 4,096 events, 12 layers and a million steps, 1.82 (v1) and 1.90 (v3) nats per event on the
validation split, where a Music Transformer had 1.84 on v1, with augmentation.

Here: configs/maestro_v3_small.py with 512 latents of 2,048 inputs and a rate of 3e-3, for 200 steps of 2,048 targets,
scored on the first 65,536 events of the validation split in windows that advance by 256 events, so that a short context
is never empty. Each run had one core, which other programs slowed down by up to a half. The config now has 128 latents
of 1,024 inputs and a rate of 3.2e-2, which were found later. Needs your copy of MAESTRO v3:
--config.data.data_dir=FOLDER

Result: Muon ends 8% below Adam. After 200 steps, a longer context gains nothing: a plain Transformer of 512 inputs
ends 0.4% below 512 latents of 2,048 inputs, in about as many seconds and with 15% fewer FLOPs.
"""

from configs import maestro_v3_small

VARIANTS = {
  "perceiver-ar": "512 latents of 2,048 inputs",
  "context-1024": "512 latents of 1,024 inputs",
  "transformer": "as many latents as inputs, 512: a plain Transformer, the same number of steps",
  "transformer-longer": "the same with half as many steps again: 1.27 times the FLOPs of 512 latents of 2,048 inputs",
  "adam": "Adam at a third of the learning rate instead of Muon",
}


def get_config(variant="perceiver-ar"):
  config = maestro_v3_small.get_config()
  config.model.update(max_context=2048, num_latents=512)
  config.data.min_crop = 513
  config.train.update(steps=200, batch_size=4, checkpoint_every=100)
  config.train.optimizer.update(learning_rate=3e-3, warmup_steps=50, decay_steps=100)
  config.eval.update(batch_size=4, stride=256)
  if variant == "context-1024":
    config.model.max_context = 1024
  elif variant.startswith("transformer"):
    config.model.max_context = 512
  elif variant == "adam":
    config.train.optimizer.update(name="adam", learning_rate=1e-3)
  if variant == "transformer-longer":
    config.train.steps = 300
    config.train.optimizer.decay_steps = 150
  config.eval.every = config.train.steps
  return config
