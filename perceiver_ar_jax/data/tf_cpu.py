"""TensorFlow, hidden from accelerators and quiet: all modules of this package import `tf` from here.

At its first operation, TensorFlow allocates all memory of every GPU that it sees, which leaves none for JAX. Import
this module before anything else runs a TensorFlow operation.
"""

import tensorflow as tf

tf.get_logger().setLevel("ERROR")
for _kind in ("GPU", "TPU"):
  tf.config.set_visible_devices([], _kind)

__all__ = ["tf"]
