"""Sequences: where they come from, how they become events, and how events become batches.

registry.py defines tasks and tasks.py those of the project. sources.py, files.py and photos.py provide records;
images.py, texts.py, music.py (with midi.py) and codes.py convert a record to the events of a document (documents.py)
and back. windows.py cuts documents into model inputs, loader.py makes training batches, splits.py reads a split in
order. Apart from this path, cache.py stores documents, train_sentencepiece.py makes a vocabulary, and inspect.py and
render.py show data. No module here imports model code.

Ids of events: 0 PAD, 1 EOS, 2 SOS, value v is v + 3. Positions count from 1; 0 is padding.

This module imports no library, so that the parts without TensorFlow (images.py) stay quick to load; TensorFlow itself
is imported in one place only, tf_cpu.py.
"""

PAD = 0
EOS = 1
SOS = 2
NUM_SPECIAL = 3
"""Ids before the first value: a byte or colour value v is the event v + NUM_SPECIAL."""
