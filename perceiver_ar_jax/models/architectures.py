"""The models that a config can name, in one table; all of them are called as perceiver_ar.PerceiverAR is."""

from flax import linen as nn

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR
from perceiver_ar_jax.models.transformer_xl import TransformerXL

ARCHITECTURES = {"perceiver_ar": PerceiverAR, "transformer_xl": TransformerXL}


def make_model(config: ModelConfig) -> nn.Module:
  """The model that `config.architecture` names."""
  return ARCHITECTURES[config.architecture](config)
