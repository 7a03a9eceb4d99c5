"""The user's own files: which ones `data.files` names, which of them are held out, and their bytes.

Paths with a scheme (gs://...) go through TensorFlow, all others through the operating system.
"""

import collections
import concurrent.futures
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

_CROSSING = re.compile(r"(?:^|(?<=/))\*\*(?:/|$)")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def read_bytes(path: str, start: int = 0, size: int = -1) -> bytes:
  """Returns `size` bytes of a file from `start` on (-1: the rest).

  Raises Unreadable if it is not a regular file, cannot be read, or has become shorter.
  """
  if not _is_remote(path):
    file_size(path)  # opening a named pipe would wait forever
  try:
    with tf.io.gfile.GFile(path, "rb") if _is_remote(path) else open(path, "rb") as file:
      file.seek(start)
      content = file.read(size)
  except (OSError, tf.errors.OpError) as error:
    raise Unreadable(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
  if len(content) < size:
    raise Unreadable(f"{path} ends at byte {start + len(content):,} now, and was longer when training began")
  return content


def file_size(path: str) -> int:
  """Returns the size of a file in bytes; raises Unreadable as `read_bytes`."""
  try:
    if _is_remote(path):
      return tf.io.gfile.stat(path).length
    result = os.stat(path)
  except (OSError, ValueError, tf.errors.OpError) as error:  # ValueError: a zero byte in the name
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
      reason = f"it links to {os.readlink(path)}, which does not exist"
    raise Unreadable(f"{path} cannot be read: {reason}") from error
  if not stat.S_ISREG(result.st_mode):
    raise Unreadable(f"{path} is {_KINDS.get(stat.S_IFMT(result.st_mode), 'a device')}, not a regular file")
  return result.st_size


def find_files(pattern: str, suffixes: Sequence[str]) -> list[str]:
  """Returns the files of a glob ("**" crosses folders), or those in a folder that end in one of `suffixes`, sorted.

  Names that begin with a dot are left out, unless the glob has the dot. Links are followed, and each real file is
  listed once. What is not a file is skipped with a notice, and so are other endings. Raises InputError if none is left.
  """
  try:
    is_folder = tf.io.gfile.isdir(pattern)
    if is_folder:
      folders = tf.io.gfile.walk(pattern) if _is_remote(pattern) else _walk(pattern)
      paths = [os.path.join(top, name) for top, _, names in folders for name in names if not name.startswith(".")]
    else:
      paths = _expand(pattern)
  except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError, tf.errors.PermissionDeniedError) as error:
    raise InputError(f"{pattern!r} cannot be listed: {error.message}") from error
  others = [name for name in paths if is_folder and not name.lower().endswith(tuple(suffixes))]
  if others:
    paths = set(paths).difference(others)
    endings = collections.Counter(pathlib.PurePath(name).suffix.lower() or "no ending" for name in others)
    described = ", ".join(f"{ending} {count:,}" for ending, count in endings.most_common(8))
    notice = f"Not read in {pattern!r} because of their endings: {len(others):,} files ({described})."
    warn_once(None, f"{notice} A glob takes any ending.")
  paths = _once_each(filter(_is_usable, paths), _base_folder(pattern))
  if not paths:
    exists = is_folder or glob.has_magic(pattern) or os.path.lexists(pattern)
    raise InputError(
      f"{pattern!r} {'contains no matching file' if exists else 'does not exist'}. Set data.files (or"
      f" data.validation_files) to a folder with {', '.join(suffixes)} files, or to a glob in quotes, of any ending,"
      f" such as 'folder/**/*{suffixes[0]}'."
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
  problem = "This run is of an older version, which held out files by a hash of their names"
  fix = "give a folder of those files (or of links to them) as --config.data.validation_files=FOLDER"
  is_found = data.validation_files != HELD_OUT_BY_NAME
  require(is_found, f"{problem}: to evaluate it or to resume its training, {fix}.")
  validation = find_files(data.validation_files, suffixes) if data.validation_files else _hold_out(data, files)
  held_out = set(_real_paths(validation))
  train = [path for path, real in zip(files, _real_paths(files)) if real not in held_out]
  total, setting = len(validation) + len(train), "validation_files" if data.validation_files else "validation_fraction"
  counts = f"{len(validation):,} of {total:,} files (data.{setting}={getattr(data, setting)!r})"
  warn_once(None, f"Held out for validation: {counts}.")
  problem = f"All {len(files)} files of data.files={data.files!r} are held out for validation"
  fix = "add files, name those to hold out in data.validation_files, or, for text, hold out the last part of each"
  require(split != "train" or bool(train), f"{problem}: {fix} (data.split_by=position).")
  return train if split == "train" else validation


def _hold_out(data: DataConfig, files: Sequence[str]) -> list[str]:
  """The files to hold out by `data.validation_fraction`, sorted: at least one, but no empty one if there is another."""
  folder = _base_folder(data.files)
  digests = {path: hashlib.blake2b(_relative(path, folder).encode(), digest_size=4).digest() for path in files}
  chosen = [path for path in files if int.from_bytes(digests[path]) < data.validation_fraction * 2**32]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # sizes of remote files are requests over the network
    chosen = [path for path, size in zip(chosen, pool.map(file_size, chosen)) if size]
  ranked = sorted(files, key=digests.get)
  return chosen or [next(filter(file_size, ranked), ranked[0])]


def _is_remote(path: str) -> bool:
  return "://" in path


def _base_folder(path: str) -> str:
  """The folder that files are named relative to: `path`, or the folder in which the first wildcard of a glob is."""
  fixed = re.split(r"[*?\[]", path)[0]
  return path if tf.io.gfile.isdir(path) else fixed[: fixed.rfind("/") + 1]


def _relative(path: str, folder: str) -> str:
  if path.startswith(folder):  # nearly always, and much faster
    return os.path.normpath(path.removeprefix(folder).lstrip("/"))
  return os.path.relpath(path, folder)


def _expand(pattern: str) -> list[str]:
  """As glob.glob(pattern, recursive=True), which lists files again and again where a link leads to a parent folder."""
  if _is_remote(pattern):
    return tf.io.gfile.glob(pattern)
  crossing = _CROSSING.search(pattern)
  if not crossing:
    return [path for path in glob.glob(pattern) if not os.path.isdir(path)]
  start, rest = pattern[: crossing.start()], pattern[crossing.end() :] or "*"
  folders = [folder for top in (glob.glob(start) if start else ["."]) for folder, _, _ in _walk(top)]
  return [path for folder in folders for path in _expand(os.path.join(glob.escape(folder), rest))]


def _walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
  """Yields (folder, subfolders, names of files) of `top` and all below it but hidden folders, each real folder once.

  Links are followed, but not to a folder that contains `top`. Folders come before links to them, so that a link added
  later does not change the path of any file.
  """

  def report(error: OSError) -> None:
    warn_once(None, f"Skipped: the folder {error.filename} cannot be read: {error.strerror}.")

  real_top, seen, starts = os.path.realpath(top), set(), [top]
  for start in starts:  # grows in the loop
    for folder, subfolders, names in os.walk(start, onerror=report):
      real = os.path.realpath(folder)
      is_around = real != real_top and real_top.startswith(os.path.join(real, ""))
      if is_around:
        warn_once(None, f"Not followed: {folder} links to {real}, which contains {top}.")
      if is_around or real in seen:
        subfolders.clear()
        continue
      seen.add(real)
      subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
      starts += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
      yield folder, subfolders, names


def _is_usable(path: str) -> bool:
  """False, with a notice, for what is not a regular file and for names that TensorFlow cannot represent."""
  try:
    path.encode("utf-8")
    return _is_remote(path) or file_size(path) >= 0
  except UnicodeEncodeError:
    reason = f"the name of {path!r} is not UTF-8"
  except Unreadable as error:
    reason = str(error)
  warn_once("skipped", f"Skipped: {reason}", subject=path)
  return False


def _once_each(paths: Iterable[str], folder: str) -> list[str]:
  """One path of each real file, sorted; one without links if there is such a path."""
  paths, real_folder, by_file = sorted(paths), os.path.realpath(folder), {}
  for path, real in zip(paths, _real_paths(paths)):
    if by_file.setdefault(real, path) != path and real == os.path.join(real_folder, _relative(path, folder)):
      by_file[real] = path
  return sorted(by_file.values())


def _real_paths(paths: Sequence[str]) -> Iterator[str]:
  """Yields each path as it is without links, the same for all spellings of a path."""
  real_folder = functools.cache(os.path.realpath)
  for path in paths:
    if _is_remote(path):
      yield path
    elif os.path.islink(path):
      yield os.path.realpath(path)
    else:
      yield os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))
