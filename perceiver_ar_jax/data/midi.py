"""Standard MIDI files: reads the messages that decide when notes sound, and writes notes; music.py interprets them.

The parser is our own because the fast library (symusic) drops what the meaning of a note depends on: notes that are
never released, and the channel and the order of messages at one tick, without which neither the sustain pedal nor All
Notes Off can be applied. mido takes a third of a second for a piano performance. Here a regular expression finds the
runs of ordinary messages, nearly all of a file, and NumPy decodes them; other events are read one by one.
"""

import array
import re
import struct
from collections.abc import Iterable

import numpy as np

NOTE_OFF, NOTE_ON, CONTROL_CHANGE = 0x80, 0x90, 0xB0
SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_ALL_CONTROLLERS, ALL_NOTES_OFF = 64, 120, 121, 123
_CONTROLLERS = (SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_ALL_CONTROLLERS, *range(ALL_NOTES_OFF, 128))
"""124 to 127 switch between omni, mono and poly mode, which implies All Notes Off."""

_SYSTEM, _META, _END_OF_TRACK, _TEMPO = 0xF0, 0xFF, 0x2F, 0x51
_NUM_DATA_BYTES = dict.fromkeys(range(0x80, 0xF0), 2) | dict.fromkeys(range(0xC0, 0xE0), 1)
_NUM_DATA_BYTES |= {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0, 0xF8: 0, 0xFA: 0, 0xFB: 0, 0xFC: 0, 0xFE: 0}
"""Of each status that has a fixed number of them."""
_DEFAULT_TEMPO = 500_000  # microseconds per beat, until a file sets another tempo
_MAX_SECONDS = 24 * 3600  # a longer file has damaged times, which would become millions of time shifts

_RUN = re.compile(rb"(?:[\x80-\xff]{0,3}[\x00-\x7f][\x80-\xbf\xe0-\xef]?[\x00-\x7f]{2}){32,}+")
"""Messages of two data bytes, each after its time and, unless it is that of the message before, its status. Fewer than
32 are read faster one by one."""
_NOT_READ = -1  # the number of an event that is not read


def read(content: bytes) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns the note-ons, note-offs and changes of _CONTROLLERS of a MIDI file, and its end.

  Times are float64[N] in seconds, in order; messages int64[3, N]: status (kind | channel), number (pitch or
  controller), velocity or value, those at one tick in the order of the file. Of everything else only the tempo is read,
  and a tempo of 0 is ignored. A RIFF container (.rmi) is unwrapped. Raises ValueError if it is not a complete MIDI file
  of type 0 or 1 whose times are in ticks per beat, a message has a data byte above 127, or it lasts more than a day.
  """
  ticks_per_beat, tracks = _split(content)
  parts = []
  for number, track in enumerate(tracks, 1):
    try:
      parts.append(_read_track(track))
    except (IndexError, ValueError) as error:
      raise ValueError(f"track {number} is damaged or truncated: {error}") from error
  events_5xN = np.concatenate(parts, axis=1)
  ticks_N, *messages, tempos_N = events_5xN.take(np.argsort(events_5xN[0], kind="stable"), axis=1)
  # Microseconds are whole numbers, exact up to 2**53, so that errors do not add up; more of them exceed the limit.
  tempos = _fill_forward(np.append(_DEFAULT_TEMPO, tempos_N)[:-1]).astype(np.float64)
  seconds_N = np.cumsum(np.diff(ticks_N, prepend=0) * tempos) / (1_000_000 * ticks_per_beat)
  end = float(seconds_N.max(initial=0))
  if end > _MAX_SECONDS:
    raise ValueError(f"it lasts more than {_MAX_SECONDS // 3600} hours, so its times are damaged")
  kinds_N, numbers_N = messages[0] & 0xF0, messages[1]
  is_note_N = (kinds_N < NOTE_ON + 16) & (numbers_N != _NOT_READ)
  is_read_N = is_note_N | (kinds_N == CONTROL_CHANGE) & np.isin(numbers_N, _CONTROLLERS)
  messages_3xN = np.compress(is_read_N, messages, axis=1)
  if (largest := messages_3xN[1:].max(initial=0)) > 127:
    raise ValueError(f"a note or control change has the data byte {largest}, which is above 127")
  return seconds_N[is_read_N], messages_3xN, end


def write(notes: Iterable[tuple[int, int, float, float]]) -> bytes:
  """Returns a MIDI file with one piano track of notes (pitch, velocity, onset, offset), times in seconds.

  Times are rounded to 1 ms, and a note lasts at least 1 ms. `music.read_notes` returns the same notes, except that the
  offsets of two notes of one pitch are exchanged where one lies within the other.
  """
  messages = []
  for pitch, velocity, onset, offset in notes:
    start = round(onset * 1000)
    messages.append((start, NOTE_ON, int(pitch), int(velocity)))
    messages.append((max(round(offset * 1000), start + 1), NOTE_OFF, int(pitch), 0))
  track = bytearray(b"\0\xff\x51\3" + _DEFAULT_TEMPO.to_bytes(3) + b"\0\xc0\0")  # the tempo; program 0, a piano
  last_time = 0
  # Note-offs sort before note-ons of the same time, so that a repeated note does not end as it begins.
  for time, *data in sorted(messages):
    delta, last_time = time - last_time, time
    shifts = range((max(delta.bit_length(), 1) - 1) // 7 * 7, 0, -7)
    track += bytes([*(0x80 | delta >> shift & 0x7F for shift in shifts), delta & 0x7F, *data])
  track += b"\0\xff\x2f\0"
  header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, _DEFAULT_TEMPO // 1000)
  return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def _split(content: bytes) -> tuple[int, list[bytes]]:
  """Returns the ticks per beat and the tracks.

  Other chunks are skipped. Fewer tracks than the header announces are accepted if the file ends after a whole chunk.
  """
  if content[:4] == b"RIFF":
    content = content[max(content.find(b"MThd"), 0) :]
  if content[:4] != b"MThd" or len(content) < 14:
    raise ValueError("it does not contain the header of a MIDI file")
  header_size, file_type, num_tracks, division = struct.unpack_from(">IHHH", content, 4)
  if file_type > 1 or not 0 < division < 0x8000:
    problem = f"type {file_type} with time division {division:#06x} is not supported"
    raise ValueError(f"{problem}, only types 0 and 1 with ticks per beat")
  tracks, start = [], 8 + header_size
  while start < len(content) and (len(tracks) < num_tracks or content[start : start + 4] == b"MTrk"):
    name, size = content[start : start + 4], int.from_bytes(content[start + 4 : start + 8])
    start += 8
    if start + size > len(content):
      raise ValueError(f"it is truncated: a chunk announces {size:,} bytes, and {len(content[start:]):,} follow")
    if name == b"MTrk":
      tracks.append(content[start : start + size])
    start += size
  if not tracks:
    raise ValueError("it has no tracks")
  return division, tracks


def _read_track(track: bytes) -> np.ndarray:
  """Returns int64[5, N] of the events of a track: tick, status, two data bytes (_NOT_READ, 0: others), tempo (0: none).

  Raises IndexError if the track ends in the middle of an event, ValueError for other damage.
  """
  events, position, running_status = array.array("i"), 0, 0
  while position < len(track):
    if _NUM_DATA_BYTES.get(running_status) == 2 and (run := _RUN.match(track, position)):
      events.frombytes(_parse_run(run[0], running_status).tobytes())
      position, running_status = run.end(), events[-4]
      continue
    wait, position = _variable_length(track, position)
    status, number, value, tempo = track[position], _NOT_READ, 0, 0
    if status >= 128:
      position += 1
    elif not running_status:
      raise ValueError("an event has no status")
    else:
      status = running_status
    if status < _SYSTEM:
      running_status = status  # not canceled by system exclusive and meta events: many files rely on it
      if _NUM_DATA_BYTES[status] == 2:
        number, value = track[position], track[position + 1]
      position += _NUM_DATA_BYTES[status]
    elif status == _META:
      kind = track[position]
      size, position = _variable_length(track, position + 1)
      if kind == _TEMPO and size == 3:
        tempo = int.from_bytes(track[position : position + 3])
      position = len(track) if kind == _END_OF_TRACK else position + size
    elif status in (0xF0, 0xF7):  # system exclusive
      size, position = _variable_length(track, position)
      position += size
    elif status in _NUM_DATA_BYTES:
      position += _NUM_DATA_BYTES[status]
    else:
      raise ValueError(f"the status byte {status:#x} is not defined")
    events.extend((wait, running_status, number, value, tempo))
  if position > len(track):
    raise IndexError
  waits_N, *others = np.array(events, np.int32).reshape(-1, 5).T
  return np.stack([np.cumsum(waits_N, dtype=np.int64), *others])


def _parse_run(run: bytes, running_status: int) -> np.ndarray:
  """Returns int32[N, 5] of the messages of a run: ticks to wait, and the rest as `_read_track`."""
  data = np.frombuffer(run, np.uint8)
  # Of each message three bytes are below 128: the last one of its time, and both data bytes.
  waited_N, first_N, second_N = np.flatnonzero(data < 128).reshape(-1, 3).T
  starts_N = np.append(0, second_N[:-1] + 1)
  waits_N = data[waited_N].astype(np.int32)
  for index in range(1, 4):  # bytes of the time before its last one
    waits_N += np.where(waited_N - index >= starts_N, (data[waited_N - index] & np.int32(0x7F)) << 7 * index, 0)
  statuses_N = np.where(first_N - waited_N > 1, data[waited_N + 1], 0)
  statuses_N = _fill_forward(np.append(running_status, statuses_N))[1:]
  columns = waits_N, statuses_N, data[first_N], data[second_N], np.zeros_like(waits_N)
  return np.stack(columns, axis=1, dtype=np.int32, casting="unsafe")


def _fill_forward(values_N: np.ndarray) -> np.ndarray:
  """Replaces each 0 by the last value before it that is not 0."""
  return values_N[np.maximum.accumulate(np.where(values_N > 0, np.arange(len(values_N)), 0))]


def _variable_length(track: bytes, position: int) -> tuple[int, int]:
  """Returns the number of 1 to 4 bytes at `position`, 7 bits in each, and the position after it."""
  number = 0
  for end in range(position + 1, position + 5):
    number = number << 7 | track[end - 1] & 0x7F
    if track[end - 1] < 128:
      return number, end
  raise ValueError(f"the number at byte {position} has more than 4 bytes")
