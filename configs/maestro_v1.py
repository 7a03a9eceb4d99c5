"""MAESTRO v1: configs/maestro_v3.py on the first version of the data, which most papers report.

Published: 1.82 nats per event on the validation and on the test split; Music Transformer, with augmentation, 1.84.
"""

from configs import maestro_v3


def get_config():
  config = maestro_v3.get_config()
  config.data.task = "maestro_v1"
  return config
