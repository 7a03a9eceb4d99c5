"""Sequences: where they come from, how they become events, and how events become batches.

tasks.py is the registry, sources.py and photos.py know where records lie, images.py how a picture is laid out as
events, features.py cuts documents into model inputs, pipeline.py feeds hosts. This room knows no model.

A *document* is one whole sequence: `events` int32[N], `positions` int32[N, P] (1-based), and optionally `scored`
int32[N] (0: the event does not count in evaluation). Ids: 0 PAD, 1 EOS, 2 SOS, value v is v + 3.

This module imports no library, so that the parts without TensorFlow (images.py) stay quick to load; TensorFlow itself
is imported in one place only, tf_cpu.py.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, when TensorFlow loads: keeps its start-up notes out

PAD = 0
EOS = 1
SOS = 2
NUM_SPECIAL = 3
"""Ids before the first value: a byte or colour value v is the event v + NUM_SPECIAL."""
