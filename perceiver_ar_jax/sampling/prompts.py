"""Prompts, the beginnings of samples: texts (str), files (paths; for the command line, see `parse`), and documents."""

import glob
import itertools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from perceiver_ar_jax.config import Config, InputError, reading, require
from perceiver_ar_jax.data import EOS, SOS, splits
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task

DATA = "data"  # the prompt that means documents of eval.split
_SUFFIXES = "csv gz html json jsonl log md mid midi npy npz py rst tex text tsv txt xml".split()
_PATH = re.compile(rf"(/|\./|\.\./|~/).*|[^\s]*/[^\s]*|.*\.({'|'.join(_SUFFIXES)})", re.IGNORECASE)


class Prompt(NamedTuple):
  """The beginning of a sample, and the known properties of its continuation."""

  task: Task
  events: np.ndarray  # int32[n], n >= 1
  place: Callable[[int, int], np.ndarray]  # positions, as Task.place
  length: int | None = None  # events of the whole sample; None: any number
  original: np.ndarray | None = None  # all events of the document that the prompt begins, if any


def parse(task: Task, setting: str | None) -> str | epath.Path | None:
  """Returns the prompt of a setting of the command line as Python takes it, by the rule in SampleConfig.prompt."""
  if setting is None or setting == DATA:
    return setting
  is_path = setting.startswith("@") or task.modality != "text" or _PATH.fullmatch(setting)
  return epath.Path(setting.removeprefix("@")) if is_path else setting


def find(config: Config, task: Task, prompt: Any, count: int, prompt_tokens: int | None = None) -> list[Prompt]:
  """Returns the prompts of `count` samples, at least one, of what Sampler.__call__ takes.

  None is config.sample.prompt. Without that, a task whose positions only a document has begins with documents of
  eval.split. Raises InputError as `read`, for a prompt of another type, and if the split has no readable document.
  """

  def given(prompt: str | os.PathLike) -> list[Prompt]:
    return [_beginning(config, task, document, prompt_tokens, is_given=True) for document in read(task, prompt)]

  if isinstance(prompt, list):  # in which "data" is a text
    several = (given(x) if isinstance(x, str) else find(config, task, x, count, prompt_tokens) for x in prompt)
    return list(itertools.chain.from_iterable(several))
  if isinstance(prompt, Prompt):
    return [prompt]
  if isinstance(prompt, np.ndarray):
    return [_from_events(task, prompt)]
  prompt = parse(task, config.sample.prompt) if prompt is None else prompt
  if prompt is None and task.place is not None:
    return [Prompt(task, np.array([SOS], np.int32), task.place, task.length)]
  if prompt in (None, DATA):
    num_tokens = 1 if prompt is None else prompt_tokens  # 1: the document provides only the grid
    documents = itertools.islice(splits.documents(config, config.eval.split, count), count)
    return [_beginning(config, task, document, num_tokens) for _, document in documents]
  is_known = isinstance(prompt, str | os.PathLike)
  require(is_known, f"The prompt {prompt!r} is not a text, a path or an array: give events as np.array([2, ...]).")
  return given(prompt)


def _from_events(task: Task, events: np.ndarray) -> Prompt:
  """Returns the prompt of given events int32[n]; raises InputError if they are not events of the task."""
  is_int, size = np.issubdtype(events.dtype, np.integer), task.vocab_size
  require(bool(len(events)) and is_int, "The prompt has no events: give integers, such as SOS (2), at least one.")
  wrong = events[(events < 1) | (events >= size)]
  if len(wrong):
    raise InputError(f"The prompt contains the unknown token {wrong[0]}: ids of {task.name} are 1..{size - 1}.")
  require(task.place is not None, f"Events alone do not contain the grid of a {task.modality}: give a file or 'data'.")
  return Prompt(task, events.astype(np.int32), task.place, task.length)


def read(task: Task, prompt: str | os.PathLike) -> list[Document]:
  """Returns the document of a text, given as a str, or the documents of files, given as a path or a pattern of paths.

  Raises InputError for an empty text, a text for a task that reads files, and a missing or unreadable file.
  """
  if task.read is None:
    raise InputError(f"The task {task.name} has no files: its own documents are the prompt {DATA!r}, not {prompt!r}.")
  if not isinstance(prompt, str):
    return [_read_file(task, path) for path in _files(epath.Path(prompt).expanduser())]
  problem = f"The prompt {prompt!r} is a str, which is a text, and the task {task.name} reads files"
  require(task.modality == "text", f"{problem}: give pathlib.Path({prompt!r}).")
  require(prompt.strip() != "", "The prompt is empty: give a text or a file, or None to sample without a prompt.")
  try:
    return [task.read(prompt.encode())]
  except UnicodeEncodeError as error:
    raise InputError(f"The prompt is not a text in Unicode ({error}): give it in a file.") from error


def _files(path: epath.Path) -> list[epath.Path]:
  """Returns the file at `path`, or else the files that match it as a pattern."""
  if path.is_file():
    return [path]
  pattern = os.fspath(path)
  files = [epath.Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
  if not files:
    problem = "is a folder" if path.is_dir() else "matches no file" if glob.has_magic(pattern) else "does not exist"
    fix = "give a file, or a pattern such as 'folder/**/*.txt', or write a text that looks like a path to a file"
    raise InputError(f"The prompt {path} {problem}: {fix}.")
  return files


def _read_file(task: Task, path: epath.Path) -> Document:
  if task.modality != "text":
    return task.read(os.fspath(path))
  with reading(path, "check its permissions"):
    content = path.read_bytes()
  require(bool(content), f"The prompt {path} is empty: give a file that contains text.")
  return task.read(content)


def _beginning(config: Config, task: Task, document: Document, prompt_tokens: int | None, is_given=False) -> Prompt:
  length, half = len(document), -(-len(document) // 2)
  has_end = task.length is not None or task.place is None
  if prompt_tokens is None and (has_end or not is_given):
    prompt_tokens = half if has_end else min(half, max(config.model.max_context // 2, 1))
  events = document.read(0, min(prompt_tokens or length, length))
  if len(events) > 1 and events[-1] == EOS:
    events = events[:-1]
  original = document.read(0, length) if has_end else None
  return Prompt(task, events, task.place or document.positions, length if has_end else None, original)
