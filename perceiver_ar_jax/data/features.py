"""Documents become model inputs: crops for training, sliding blocks for evaluation, all of one fixed shape.

Events e_0 .. e_{N-1} of a document give the inputs e_0 .. e_{N-2} and the targets e_1 .. e_{N-1}: each target is the
event after its input. A window is the stretch of at most `context` inputs that ends at a given event, right-aligned
(PAD on the left), with the targets of its last `latents` inputs:

    context 4, latents 2, events SOS a b c d e:   ending at e:   inputs   a   b   c   d   targets d e
                                                  ending at b:   inputs PAD PAD SOS   a   targets a b

Everything here runs in TensorFlow graphs and depends on its arguments alone; randomness comes from explicit seeds.
"""

from perceiver_ar_jax.data.tf_cpu import tf

MIN_EVENTS = 2
"""The shortest document or crop that has anything to predict: one input and its target."""


def window(document, end, num_new, *, context: int, latents: int) -> dict[str, tf.Tensor]:
  """The model inputs of the window whose last target is event `end` - 1.

  Args:
    document: events int32[N], positions int32[N, P] and optionally scored int32[N].
    end: events up to and including the last target; int64, in 1..N (1: no target, so everything is padding).
    num_new: how many of the last targets may weigh 1, if `scored` allows; the others only provide context.
    context: L, number of input slots.
    latents: M, number of target slots.

  Returns:
    inputs int32[L], positions int32[L, P], targets int32[M], weights float32[M].
  """
  document = {name: tf.convert_to_tensor(values) for name, values in document.items()}
  events_N, positions_NxP = document["events"], document["positions"]
  start = tf.maximum(end - 1 - context, 0)
  targets_start = tf.maximum(start + 1, end - latents)
  scored_N = document.get("scored", tf.ones_like(events_N))
  targets = _align_right(events_N[targets_start:end], latents)
  new_M = tf.cast(tf.range(latents, 0, -1), end.dtype) <= tf.minimum(num_new, end - targets_start)
  scored_M = tf.cast(_align_right(scored_N[targets_start:end], latents), tf.float32)
  return {
    "inputs": _align_right(events_N[start : end - 1], context),
    "positions": _align_right(positions_NxP[start : end - 1], context),
    "targets": targets,
    "weights": tf.cast(new_M, tf.float32) * scored_M,
  }


def train_window(document, seed, *, context: int, latents: int, min_crop: int) -> dict[str, tf.Tensor]:
  """A random window of a document, as `window`; every target weighs 1.

  The crop ends anywhere from event `min_crop` to the last, evenly, and reaches back as far as fits. A larger
  `min_crop` keeps the first events, which every short crop holds, from being seen too often.

  Args:
    document: see `window`; at least MIN_EVENTS long. Its `scored` is for evaluation and has no effect here.
    seed: int64[2], fixes the crop.
    context: L.
    latents: M.
    min_crop: shortest crop in events, target included; documents that are shorter come whole.
  """
  length = tf.size(document["events"], out_type=tf.int64)
  shortest = tf.minimum(tf.constant(max(min_crop, MIN_EVENTS), tf.int64), length)
  end = tf.random.stateless_uniform((), seed, shortest, length + 1, tf.int64, alg="philox")
  document = {name: document[name] for name in ("events", "positions")}
  return window(document, end, tf.constant(latents, tf.int64), context=context, latents=latents)


def eval_blocks(document, stride: int) -> tf.data.Dataset:
  """Dataset of (end, num_new) int64 pairs: blocks of `stride` targets that together cover each target just once.

  The first block is the short one when `stride` does not divide the number of targets, so that all the later ones
  have as much context as can be.
  """
  num_targets = tf.maximum(tf.size(document["events"], out_type=tf.int64) - 1, 0)
  num_blocks = (num_targets + stride - 1) // stride
  first = num_targets - (num_blocks - 1) * stride

  def block(index):
    return 1 + first + index * stride, tf.where(index == 0, first, tf.constant(stride, tf.int64))

  return tf.data.Dataset.range(num_blocks).map(block)


def _align_right(values, length: int) -> tf.Tensor:
  """`values` [n, ...] with zeros before them, to `length`; n <= length."""
  padding = [[length - tf.shape(values)[0], 0]] + [[0, 0]] * (values.shape.rank - 1)
  return tf.ensure_shape(tf.pad(values, padding), [length, *values.shape[1:]])
