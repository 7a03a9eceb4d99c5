"""What samples begin with: texts, files, and documents of a dataset become prompts."""

import glob
import itertools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import EOS, SOS, records
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.warn_once import warn_once

DATA = "data"
"""The prompt that stands for documents of the split that is evaluated."""


class Prompt(NamedTuple):
  """How a sample begins, and what is known of its further course."""

  task: Task
  events: np.ndarray
  """int32[n], n >= 1."""
  place: Callable[[int, int], np.ndarray]
  """Positions, as Task.place."""
  length: int | None = None
  """Events of the whole sample; None: any."""
  original: np.ndarray | None = None
  """All events of the document that the prompt is the beginning of, if it is one."""


def find(config: Config, task: Task, text: str | None, count: int, prompt_tokens: int | None = None) -> list[Prompt]:
  """Prompts for `count` samples, at least one: as config.SampleConfig.prompt says of `text`.

  Raises:
    InputError: an empty text, a file that is not there or cannot be read, a task without such prompts, a split without
      documents.
  """
  if text is None and task.place is not None:
    return [Prompt(task, np.array([SOS], np.int32), task.place, task.length)]
  if text is None or text == DATA:
    found = list(itertools.islice(records.documents(config, config.eval.split, count), count))
    if not found:
      raise records.none_readable(config, config.eval.split)
    if text is None:  # of a video, even the grid is the document's
      prompt_tokens = 1
    return [_beginning(config, task, document, prompt_tokens) for task, document in found]
  return [_beginning(config, task, document, prompt_tokens, own=True) for document in read(task, text)]


def read(task: Task, text: str) -> list[Document]:
  """The documents of a user's own text, or of the files that it names.

  Raises:
    InputError: as `find`.
  """
  if not text.strip():
    raise InputError("The prompt is empty: give a text or a file, or none at all to begin from nothing.")
  if task.read is None:
    raise InputError(
      f"The task {task.name} has no files, so {text!r} cannot be read: its own documents are the prompt {DATA!r}."
    )
  files = sorted(path for path in glob.glob(os.path.expanduser(text), recursive=True) if os.path.isfile(path))
  return [_told(task, task.read(path)) for path in files or [text]]


def _told(task: Task, document: Document) -> Document:
  """The document; tells of what its vocabulary lacks."""
  if task.unknown is not None:
    lacking = int((document.read(0, len(document)) == task.unknown).sum())
    if lacking:
      warn_once("unknown", f"{lacking} pieces of the text are unknown to the vocabulary: the model sees a gap there")
  return document


def _beginning(config: Config, task: Task, document: Document, prompt_tokens: int | None, own: bool = False) -> Prompt:
  length = len(document)
  whole = task.length is not None or task.place is None
  if prompt_tokens is None and whole:
    prompt_tokens = -(-length // 2)
  elif prompt_tokens is None and not own:
    prompt_tokens = min(-(-length // 2), max(config.model.max_context // 2, 1))
  original = document.read(0, length) if whole else None
  events = document.read(0, min(prompt_tokens or length, length))
  if len(events) > 1 and events[-1] == EOS:
    events = events[:-1]
  return Prompt(task, events, task.place or document.positions, length if whole else None, original)
