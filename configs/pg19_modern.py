"""Books with Muon and convolved keys instead of the paper's recipe: the same size, context and vocabulary.

Reproduces no published result; the paper's experiment is configs/pg19.py. The whole context is read: the paper drops
7/8 of the inputs before the latents in training, which would separate the neighbors that model.conv_taps combines.
Cost: 974M parameters; days on a pod of accelerators.
Data: as configs/pg19.py.
"""

from configs import pg19


def get_config():
  config = pg19.get_config()
  config.model.update(cross_attend_dropout=0.0, conv_taps=1)
  config.train.loss_reduction = "mean"
  config.train.optimizer.name = "muon"
  return config
