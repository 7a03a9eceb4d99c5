"""Prompts: the beginnings of samples, from texts, files and documents of a dataset.

In Python a str is always a text, and a path object is always a file. On the command line, `parse` decides.
"""

import glob
import itertools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import EOS, SOS, splits
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.warn_once import warn_once

DATA = "data"
"""The prompt that means documents of eval.split."""
_SUFFIXES = "csv gz html json jsonl log md mid midi npy npz py rst tex text tsv txt xml".split()
_PATH = re.compile(rf"(/|\./|\.\./|~/).*|[^\s]*/[^\s]*|.*\.({'|'.join(_SUFFIXES)})", re.IGNORECASE)


class Prompt(NamedTuple):
  """The beginning of a sample, and the known properties of its continuation."""

  task: Task
  events: np.ndarray
  """int32[n], n >= 1."""
  place: Callable[[int, int], np.ndarray]
  """Positions, as Task.place."""
  length: int | None = None
  """Events of the whole sample; None: any number."""
  original: np.ndarray | None = None
  """All events of the document that the prompt begins, if any."""


def parse(task: Task, setting: str | None) -> str | epath.Path | None:
  """Returns the prompt of a setting of the command line, such as sample.prompt, in the form that Python takes.

  "data" and None stay as they are. @PATH is a path, and so is every other value for a task that reads files. For a task
  of text, a value is a path if it begins with /, ./, ../ or ~/, contains a / but no space, or ends in a common suffix
  such as .txt; any other value is the text itself.
  """
  if setting is None or setting == DATA:
    return setting
  if setting.startswith("@"):
    return epath.Path(setting[1:])
  return epath.Path(setting) if task.modality != "text" or _PATH.fullmatch(setting) else setting


def find(
  config: Config, task: Task, prompt: str | os.PathLike | None, count: int, prompt_tokens: int | None = None
) -> list[Prompt]:
  """Returns prompts for `count` samples, at least one.

  Args:
    config: "data" reads documents of its `eval.split`, and so does None for a task whose positions only a document has.
    task: the task.
    prompt: None, "data", or as in `read`.
    count: the number of samples.
    prompt_tokens: as in SampleConfig.

  Raises:
    InputError: as `read`, or the split has no readable document.
  """
  if prompt is None and task.place is not None:
    return [Prompt(task, np.array([SOS], np.int32), task.place, task.length)]
  if prompt is None or prompt == DATA:
    documents = list(itertools.islice(splits.documents(config, config.eval.split, count), count))
    if not documents:
      raise splits.none_readable(config, config.eval.split)
    if prompt is None:  # the document provides only the grid, of a video for example
      prompt_tokens = 1
    return [_beginning(config, task, document, prompt_tokens) for task, document in documents]
  return [_beginning(config, task, document, prompt_tokens, is_given=True) for document in read(task, prompt)]


def read(task: Task, prompt: str | os.PathLike) -> list[Document]:
  """Returns the document of a text, given as a str, or the documents of files, given as a path or a pattern of paths.

  Raises:
    InputError: an empty text, a text for a task that reads files, or a missing or unreadable file.
  """
  if task.read is None:
    raise InputError(
      f"The task {task.name} has no files, so {os.fspath(prompt)!r} cannot be read: its own documents are the prompt"
      f" {DATA!r}."
    )
  if isinstance(prompt, str):
    if not prompt.strip():
      raise InputError("The prompt is empty: give a text or a file, or leave it out to sample without a prompt.")
    if task.modality != "text":
      raise InputError(
        f"The prompt {prompt!r} is a str, which is a text, and the task {task.name} reads files: give"
        f" pathlib.Path({prompt!r}), or {DATA!r} for documents of the task."
      )
    return [_check_vocabulary(task, task.read(prompt.encode()))]
  return [_check_vocabulary(task, _read_file(task, path)) for path in _files(epath.Path(prompt).expanduser())]


def read_setting(task: Task, setting: str) -> list[Document]:
  """Returns the documents of a setting of the command line; see `parse` and `read`."""
  return read(task, parse(task, setting))


def _files(path: epath.Path) -> list[epath.Path]:
  """Returns the file at `path`, or else the files that match it as a pattern."""
  if path.is_file():
    return [path]
  matches = [epath.Path(name) for name in sorted(glob.glob(os.fspath(path), recursive=True))]
  files = [match for match in matches if match.is_file()]
  if not files:
    problem = "is a folder" if path.is_dir() else "does not exist"
    if glob.has_magic(os.fspath(path)):
      problem = "matches no file"
    raise InputError(
      f"The prompt {path} {problem}: give the path of a file, or a pattern such as 'folder/**/*.txt'. (On the command"
      " line, a text that looks like a path has to be in a file: docs/sampling.md.)"
    )
  return files


def _read_file(task: Task, path: epath.Path) -> Document:
  if task.modality != "text":
    return task.read(os.fspath(path))
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(f"The prompt {path} cannot be read ({error.strerror or error}): check its permissions.") from error
  if not content:
    raise InputError(f"The prompt {path} is empty: give a file that contains text.")
  return task.read(content)


def _check_vocabulary(task: Task, document: Document) -> Document:
  """Returns the document; warns about tokens that are not in the vocabulary."""
  if task.unknown is not None:
    num_unknown = int((document.read(0, len(document)) == task.unknown).sum())
    if num_unknown:
      warn_once("unknown", f"{num_unknown} tokens of the text are not in the vocabulary: the model sees a gap instead")
  return document


def _beginning(
  config: Config, task: Task, document: Document, prompt_tokens: int | None, is_given: bool = False
) -> Prompt:
  length = len(document)
  has_end = task.length is not None or task.place is None
  if prompt_tokens is None and has_end:
    prompt_tokens = -(-length // 2)
  elif prompt_tokens is None and not is_given:
    prompt_tokens = min(-(-length // 2), max(config.model.max_context // 2, 1))
  original = document.read(0, length) if has_end else None
  events = document.read(0, min(prompt_tokens or length, length))
  if len(events) > 1 and events[-1] == EOS:
    events = events[:-1]
  return Prompt(task, events, task.place or document.positions, length if has_end else None, original)
