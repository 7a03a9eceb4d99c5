"""The user's own files: which ones `data.files` names, which of them are held out, and their bytes.

Paths with a scheme (gs://...) go through TensorFlow, all others through the operating system.
"""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import glob
import hashlib
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator, Sequence

from perceiver_ar_jax.config import HELD_OUT_BY_NAME, DataConfig, InputError, require
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.data.tf_cpu import tf
from perceiver_ar_jax.data.warn_once import warn_once


def read_bytes(path: str, start: int = 0, size: int = -1) -> bytes:
  """Returns `size` bytes of a file from `start` on (-1: the rest).

  Raises Unreadable as `file_size`, or if the file has become shorter.
  """
  if not _is_remote(path):
    file_size(path)  # opening a named pipe would wait forever
  with _reading(path), tf.io.gfile.GFile(path, "rb") if _is_remote(path) else open(path, "rb") as file:
    file.seek(start)
    content = file.read(size)
  if len(content) < size:
    raise Unreadable(f"{path} ends at byte {start + len(content):,} now, and was longer when training began")
  return content


def file_size(path: str) -> int:
  """Returns the size of a file in bytes; raises Unreadable if it is not a regular file, or cannot be read."""
  with _reading(path):
    if _is_remote(path):
      return tf.io.gfile.stat(path).length
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      raise OSError(errno.EINVAL, "it is not a regular file")
    return status.st_size


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  try:
    yield
  except (OSError, ValueError, tf.errors.OpError) as error:  # ValueError: a zero byte in the name
    raise Unreadable(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def find_files(pattern: str, suffixes: Sequence[str]) -> list[str]:
  """Returns the files of a glob ("**" crosses folders), or those in a folder that end in one of `suffixes`, sorted.

  Names that begin with a dot are left out, unless the glob has the dot. Links are followed, and each real file is
  listed once. What is not a file is skipped with a notice, and so are other endings. Raises InputError if none is left.
  """
  try:
    is_folder = tf.io.gfile.isdir(pattern)
    if is_folder:
      paths = [os.path.join(folder, name) for folder, names in _walk(pattern) for name in names]
    else:
      paths = _glob(pattern)
  except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError, tf.errors.PermissionDeniedError) as error:
    raise InputError(f"{pattern!r} cannot be listed: {error.message}") from error
  if is_folder:
    others = [path for path in paths if not path.lower().endswith(tuple(suffixes))]
    paths = set(paths).difference(others)
    endings = collections.Counter(pathlib.PurePath(path).suffix.lower() or "no ending" for path in others)
    counts = ", ".join(f"{ending} {count:,}" for ending, count in endings.most_common(8))
    if others:
      warn_once(None, f"Not read in {pattern!r}: {len(others):,} files of other endings ({counts}); a glob takes any.")
  paths = _once_each(filter(_is_usable, paths))
  if not paths:
    raise InputError(
      f"No file matches {pattern!r}. Set data.files (or data.validation_files) to a folder with {', '.join(suffixes)}"
      f" files, or to a glob in quotes, of any ending, such as 'folder/**/*{suffixes[0]}'."
    )
  return paths


def own_files(data: DataConfig, suffixes: Sequence[str]) -> list[str]:
  """Returns the files that `data.files` names; raises InputError if there is no file."""
  require(bool(data.files), f"The task {data.task} reads your own files: set data.files to a folder or to a glob.")
  return find_files(data.files, suffixes)


def split_files(data: DataConfig, split: str, suffixes: Sequence[str]) -> list[str]:
  """Returns the user's files of the split "train" or "validation".

  `data.validation_files` names those held out; otherwise a hash of each file's path relative to `data.files` decides,
  so that neither adding files nor moving the folder moves a file to the other split. At least one file is held out, but
  no empty one. Raises InputError if none is left to train on.
  """
  files = own_files(data, suffixes)
  if data.validation_files == HELD_OUT_BY_NAME:
    raise InputError(
      "This run is of an older version, which held out files by a hash of their names: to evaluate it or to resume its"
      " training, give a folder of those files (or of links to them) as --config.data.validation_files=FOLDER."
    )
  validation = find_files(data.validation_files, suffixes) if data.validation_files else _hold_out(data, files)
  held_out = set(map(_real_path, validation))
  train = [path for path in files if _real_path(path) not in held_out]
  warn_once(None, f"Held out for validation: {len(validation):,} of {len(validation) + len(train):,} files.")
  if split == "train" and not train:
    raise InputError(
      f"All {len(files)} files of data.files={data.files!r} are held out for validation: add files, name those to hold"
      " out in data.validation_files, or, for text, hold out the last part of each (data.split_by=position)."
    )
  return train if split == "train" else validation


def _hold_out(data: DataConfig, files: Sequence[str]) -> list[str]:
  """The files to hold out by `data.validation_fraction`, sorted: at least one, but no empty one if there is another."""
  fixed = re.split(r"[*?\[]", data.files)[0]  # paths are relative to the folder of a glob's first wildcard
  folder = data.files if tf.io.gfile.isdir(data.files) else fixed[: fixed.rfind("/") + 1]
  names = {path: os.fsencode(os.path.relpath(path, folder)) for path in files}
  digests = {path: int.from_bytes(hashlib.blake2b(name, digest_size=4).digest()) for path, name in names.items()}
  chosen = [path for path in files if digests[path] < data.validation_fraction * 2**32]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # sizes of remote files are requests over the network
    chosen = [path for path, size in zip(chosen, pool.map(file_size, chosen)) if size]
  ranked = sorted(files, key=digests.get)
  return chosen or [next(filter(file_size, ranked), ranked[0])]


def _is_remote(path: str) -> bool:
  return "://" in path


def _glob(pattern: str) -> list[str]:
  """As glob.glob(pattern, recursive=True), which lists files again and again where a link leads to a parent folder."""
  if _is_remote(pattern):
    return tf.io.gfile.glob(pattern)
  start, crosses_folders, rest = f"{pattern}/".partition("**/")
  if not crosses_folders:
    return [path for path in glob.glob(pattern) if not os.path.isdir(path)]
  folders = [folder for top in (glob.glob(start) if start else ["."]) for folder, _ in _walk(top)]
  rest = rest.rstrip("/") or "*"
  return [path for folder in folders for path in _glob(os.path.join(glob.escape(folder), rest))]


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
  """Yields (folder, names of files) of `top` and all below it, each real folder once; nothing that is hidden.

  Links are followed, but not to a folder that contains `top`. Folders come before links to them, so that a link added
  later does not change the path of any file.
  """
  local_walk = functools.partial(os.walk, onerror=lambda error: warn_once(None, f"Skipped a folder: {error}"))
  walk = tf.io.gfile.walk if _is_remote(top) else local_walk
  starts, seen = [top], {os.fspath(parent) for parent in pathlib.Path(os.path.realpath(top)).parents}
  for start in starts:  # grows in the loop
    for folder, subfolders, names in walk(start):
      real = folder if _is_remote(folder) else os.path.realpath(folder)
      if real in seen:
        subfolders.clear()
        continue
      seen.add(real)
      subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
      starts += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
      yield folder, [name for name in names if not name.startswith(".")]


def _is_usable(path: str) -> bool:
  """Returns whether a local file is regular, with a notice if not; for a remote one, that would take a request."""
  try:
    return _is_remote(path) or file_size(path) >= 0
  except Unreadable as error:
    warn_once("skipped", f"Skipped: {error}", subject=path)
    return False


def _once_each(paths: Iterable[str]) -> list[str]:
  """Returns one path of each real file, sorted; one without links if there is such a path."""
  links_first = sorted(paths, key=lambda path: (_real_path(path) != os.path.abspath(path), path), reverse=True)
  return sorted({_real_path(path): path for path in links_first}.values())


_real_folder = functools.lru_cache(maxsize=2**16)(os.path.realpath)


def _real_path(path: str) -> str:
  """Returns the path without links, the same for all spellings of it; faster than os.path.realpath."""
  if _is_remote(path):
    return path
  if os.path.islink(path):
    return os.path.realpath(path)
  folder, name = os.path.split(path)
  return os.path.join(_real_folder(os.path.join(os.getcwd(), folder)), name)
