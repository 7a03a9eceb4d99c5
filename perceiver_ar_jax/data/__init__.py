"""Sequences: where they come from, how they become events, and how events become batches.

registry.py says what a task is, tasks.py has those of the project, sources.py and photos.py know where records lie;
images.py, texts.py, music.py (with midi.py) and codes.py turn a record into the events of a document (documents.py) and
back;
records.py opens a source's documents, features.py cuts them into model inputs, pipeline.py feeds hosts. Beside the way:
cache.py stores documents, train_sentencepiece.py makes a vocabulary, inspect.py, render.py and heat.py show what there
is. This room knows no model.

Ids of events: 0 PAD, 1 EOS, 2 SOS, value v is v + 3. Positions count from 1; 0 is padding.

This module imports no library, so that the parts without TensorFlow (images.py) stay quick to load; TensorFlow itself
is imported in one place only, tf_cpu.py.
"""

PAD = 0
EOS = 1
SOS = 2
NUM_SPECIAL = 3
"""Ids before the first value: a byte or colour value v is the event v + NUM_SPECIAL."""
