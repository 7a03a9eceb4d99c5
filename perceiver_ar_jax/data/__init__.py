"""Sequences: where they come from, how they become events, and how events become batches.

tasks.py defines the project's tasks in the registry (registry.py). sources.py, files.py and photos.py provide records;
images.py, texts.py, music.py (with midi.py) and codes.py convert a record to the events of a document (documents.py)
and back. windows.py cuts documents into model inputs, loader.py makes training batches, splits.py reads a split in
order. No module here imports model code.

Ids of events: 0 PAD, 1 EOS, 2 SOS, value v is v + 3. Positions count from 1; 0 is padding. This module imports no
library, so that images.py stays quick to load; tf_cpu.py alone imports TensorFlow.
"""

PAD, EOS, SOS = range(3)
NUM_SPECIAL = 3  # ids before the first value: a byte or color value v is the event v + NUM_SPECIAL
