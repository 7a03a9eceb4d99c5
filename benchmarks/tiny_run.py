"""Settings of a run whose steps take milliseconds, for the fault drill and long runs."""

ARGUMENTS = (
  "--config=configs/copy.py",
  "--config.model.latent_width=16",
  "--config.model.num_cross_heads=2",
  "--config.model.num_self_heads=2",
  "--config.model.num_layers=1",
  "--config.data.shuffle_buffer=8",
  "--config.train.batch_size=8",
  "--config.train.log_every=1",
  "--config.train.checkpoint_every=10",
  "--config.train.optimizer.warmup_steps=2",
  "--config.eval.every=1000",
  "--config.eval.batch_size=8",
  "--config.eval.max_sequences=8",
)
