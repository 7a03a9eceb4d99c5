"""TensorFlow, kept off accelerators and quiet: the rest of the room imports `tf` from here.

TensorFlow takes all the memory of every GPU it can see at its first operation, and then none is left for JAX. Import
this before anything else runs a TensorFlow operation.
"""

import tensorflow as tf

tf.get_logger().setLevel("ERROR")
for _kind in ("GPU", "TPU"):
  tf.config.set_visible_devices([], _kind)

__all__ = ["tf"]
