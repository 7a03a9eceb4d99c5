"""Standard MIDI files: reads the messages that decide when notes sound, and writes notes.

What the messages mean is left to music.py.

The parser is our own because the meaning of a note depends on what the fast library (symusic) drops: notes that are
never released, the channel of a message and the order of messages at one tick, without which neither the sustain pedal
nor All Notes Off can be applied. It also loses its place after a system exclusive message. mido keeps all of that and
takes a third of a second for a piano performance.
"""

import itertools
import operator
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

NOTE_OFF, NOTE_ON, CONTROL_CHANGE = 0x80, 0x90, 0xB0
SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_ALL_CONTROLLERS, ALL_NOTES_OFF = 64, 120, 121, 123
CONTROLLERS = (SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_ALL_CONTROLLERS, *range(ALL_NOTES_OFF, 128))
"""124 to 127 switch between omni, mono and poly mode, which implies All Notes Off."""

_PROGRAM_CHANGE, _PITCH_BEND, _SYSTEM = 0xC0, 0xE0, 0xF0
_META, _END_OF_TRACK, _TEMPO = 0xFF, 0x2F, 0x51
_SYSTEM_EXCLUSIVE = (0xF0, 0xF7)
_SYSTEM_DATA_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0, 0xF8: 0, 0xFA: 0, 0xFB: 0, 0xFC: 0, 0xFE: 0}
_DEFAULT_TEMPO = 500_000
"""Microseconds per beat, until a file sets another tempo."""
_MAX_SECONDS = 24 * 3600
"""A longer file has damaged times, which would become millions of time shifts."""


class Midi(NamedTuple):
  """The content of a file."""

  messages_Nx4: np.ndarray
  """int64: tick, status (kind | channel), pitch or controller, velocity or value. In order of time; messages at one
  tick keep the order of the file."""
  end_tick: int
  """The end of the longest track."""
  ticks_per_beat: int
  tempos: list[tuple[int, int]]
  """(tick, microseconds per beat from that tick on), in order of time; the first is at tick 0."""

  def seconds(self, ticks_N: np.ndarray) -> np.ndarray:
    """Returns the times float64[N] of ticks up to `end_tick`."""
    # In integers, so that rounding errors do not add up.
    starts, tempos = np.array(self.tempos).T
    elapsed = np.concatenate([[0], np.cumsum(np.diff(starts) * tempos[:-1])])
    segments_N = np.searchsorted(starts, ticks_N, side="right") - 1
    elapsed_N = elapsed[segments_N] + (ticks_N - starts[segments_N]) * tempos[segments_N]
    return elapsed_N / (1_000_000 * self.ticks_per_beat)


def read(content: bytes) -> Midi:
  """Returns the note-ons, the note-offs and the changes of CONTROLLERS in all tracks of a MIDI file.

  Of everything else only the tempo is read, and a tempo of 0 is ignored. A RIFF container (.rmi) is unwrapped.

  Raises:
    ValueError: the bytes are not a complete MIDI file of type 0 or 1 whose times are in ticks per beat, one of these
      messages has a data byte above 127, or the file lasts more than a day.
  """
  ticks_per_beat, tracks = _split(_unwrap(content))
  messages, tempos, end_tick = [], [(0, _DEFAULT_TEMPO)], 0
  for number, track in enumerate(tracks, 1):
    try:
      messages_Nx4, track_tempos, track_end = _parse(track)
    except IndexError as error:
      raise ValueError(f"track {number} ends in the middle of an event") from error
    except ValueError as error:
      raise ValueError(f"in track {number}, {error}") from error
    messages.append(messages_Nx4)
    tempos += track_tempos
    end_tick = max(end_tick, track_end)
  tempos.sort(key=operator.itemgetter(0))
  segments = itertools.pairwise([*tempos, (end_tick, 0)])
  if sum((end - start) * tempo for (start, tempo), (end, _) in segments) > _MAX_SECONDS * 1_000_000 * ticks_per_beat:
    raise ValueError(f"it lasts more than {_MAX_SECONDS // 3600} hours, so its times are damaged")
  messages_Nx4 = np.concatenate(messages)
  messages_Nx4 = messages_Nx4[np.argsort(messages_Nx4[:, 0], kind="stable")]
  return Midi(messages_Nx4, end_tick, ticks_per_beat, tempos)


def write(messages: Iterable[tuple[int, int, int, int]]) -> bytes:
  """Returns a MIDI file with one piano track, whose tick is 1 ms.

  Args:
    messages: (milliseconds, NOTE_ON or NOTE_OFF, pitch, velocity), in order of time.
  """
  track = bytearray(b"\0\xff\x51\3" + _DEFAULT_TEMPO.to_bytes(3) + b"\0\xc0\0")  # the tempo; program 0, a piano
  last_time = 0
  for time, *data in messages:
    delta = time - last_time
    last_time = time
    shifts = range((max(delta.bit_length(), 1) - 1) // 7 * 7, 0, -7)
    track += bytes([*(0x80 | delta >> shift & 0x7F for shift in shifts), delta & 0x7F, *data])
  track += b"\0\xff\x2f\0"
  header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, _DEFAULT_TEMPO // 1000)
  return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def _unwrap(content: bytes) -> bytes:
  """Returns the MIDI file inside a RIFF container; any other content unchanged."""
  if content[:4] != b"RIFF" or content[8:12] != b"RMID":
    return content
  start = 12
  while start + 8 <= len(content):
    name, size = struct.unpack_from("<4sI", content, start)
    if name == b"data":
      return content[start + 8 : start + 8 + size]
    start += 8 + size + size % 2
  raise ValueError("its RIFF container has no data chunk")


def _split(content: bytes) -> tuple[int, list[bytes]]:
  """Returns the ticks per beat and the content of each track chunk.

  Other chunks are skipped. Fewer tracks than the header announces are accepted if the file ends after a whole chunk.
  """
  if not content:
    raise ValueError("it is empty")
  if content[:4] != b"MThd":
    raise ValueError("it does not begin with MThd")
  if len(content) < 14:
    raise ValueError("it is truncated")
  header_size, file_type, num_tracks, division = struct.unpack_from(">IHHH", content, 4)
  if file_type > 1:
    raise ValueError(f"files of type {file_type} are not supported, only types 0 and 1, whose tracks play together")
  if not 0 < division < 0x8000:
    raise ValueError(f"its time division {division:#06x} is not supported, only ticks per beat")
  tracks, start = [], 8 + header_size
  while start < len(content) and (len(tracks) < num_tracks or content[start : start + 4] == b"MTrk"):
    if start + 8 > len(content):
      raise ValueError("it is truncated")
    name, size = struct.unpack_from(">4sI", content, start)
    start += 8
    if start + size > len(content):
      raise ValueError(f"it is truncated: a chunk announces {size:,} bytes, and {len(content) - start:,} follow")
    if name == b"MTrk":
      tracks.append(content[start : start + size])
    start += size
  if not tracks:
    raise ValueError("it has no tracks")
  return division, tracks


def _parse(track: bytes) -> tuple[np.ndarray, list[tuple[int, int]], int]:
  """Returns the messages, the tempos and the end tick of a track, as in Midi.

  Nearly all events are channel messages with two data bytes. NumPy computes for each byte where such an event ends if
  it begins there, so that Python only follows these links and reads the other events one by one.

  Raises:
    ValueError: an event is not valid.
    IndexError: the track ends in the middle of an event.
  """
  data, size = np.frombuffer(track + bytes(8), np.uint8), len(track)
  is_high = data >> 7
  delta_sizes = 1 + is_high[:size] * (1 + is_high[1 : size + 1] * (1 + is_high[2 : size + 2]))
  status_at = np.arange(size, dtype=np.int32) + delta_sizes
  statuses, has_status = data[status_at], is_high[status_at]
  # Statuses below 128 are data bytes: the running status is in force.
  is_short = (statuses < _PROGRAM_CHANGE) | (statuses >= _PITCH_BEND) & (statuses < _SYSTEM)
  ends = np.where(is_short & ~is_high[status_at - 1], status_at + has_status + 2, 0).tolist()

  events, tempos, position, one_data_byte = [], [], 0, False
  while position < len(track):
    events.append(position)
    if ends[position] and not one_data_byte:
      position = ends[position]
      continue
    start, position = position, _variable_length(track, position)[1]
    status = track[position]
    position += 1
    if status < 128:  # the running status is that of a message with one data byte
      continue
    if status < _SYSTEM:
      one_data_byte = _PROGRAM_CHANGE <= status < _PITCH_BEND
      position = position + 1 if one_data_byte else ends[start]
    elif status == _META:
      kind = track[position]
      size, position = _variable_length(track, position + 1)
      if kind == _END_OF_TRACK:
        break
      if kind == _TEMPO and size == 3:
        tempos.append((len(events) - 1, int.from_bytes(track[position : position + 3])))
      position += size
    elif status in _SYSTEM_EXCLUSIVE:
      size, position = _variable_length(track, position)
      position += size
    elif status in _SYSTEM_DATA_BYTES:
      position += _SYSTEM_DATA_BYTES[status]
    else:
      raise ValueError(f"the status byte {status:#x} is not defined")
  if position > len(track):
    raise IndexError

  events = np.array(events, int)
  deltas = np.zeros(len(events), np.int64)
  for place in range(4):
    deltas = np.where(delta_sizes[events] > place, deltas << 7 | data[events + place] & 0x7F, deltas)
  ticks = np.cumsum(deltas)
  data_at, statuses = status_at[events] + has_status[events], statuses[events].astype(int)
  # The running status is not cancelled by system exclusive and meta events: many files rely on it.
  sets_status = (statuses > 127) & (statuses < _SYSTEM)
  last_set = np.maximum.accumulate(np.where(sets_status, np.arange(len(events)), -1))
  if (last_set[statuses < 128] < 0).any():
    raise ValueError("an event has no status")
  statuses = np.where(statuses < 128, statuses[last_set], statuses)
  messages = np.stack([ticks, statuses, data[data_at], data[data_at + 1]], axis=1)
  is_control = (statuses >= CONTROL_CHANGE) & (statuses < _PROGRAM_CHANGE) & np.isin(messages[:, 2], CONTROLLERS)
  messages = messages[(statuses < NOTE_ON + 16) | is_control]
  if messages[:, 2:].max(initial=0) > 127:
    raise ValueError(f"a note or control change has the data byte {messages[:, 2:].max()}, which is above 127")
  tempos = [(int(ticks[event]), tempo) for event, tempo in tempos if tempo]
  return messages, tempos, int(ticks[-1]) if len(ticks) else 0


def _variable_length(track: bytes, position: int) -> tuple[int, int]:
  """Returns the number of 1 to 4 bytes at `position`, 7 bits in each, and the position after it."""
  number = 0
  for end in range(position + 1, position + 5):
    number = number << 7 | track[end - 1] & 0x7F
    if track[end - 1] < 128:
      return number, end
  raise ValueError(f"the number at byte {position} has more than 4 bytes")
