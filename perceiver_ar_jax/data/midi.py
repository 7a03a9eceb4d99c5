"""Standard MIDI files: reads the messages that decide when notes sound, and writes notes; music.py interprets them.

The parser is our own because the fast library (symusic) drops what the meaning of a note depends on: notes that are
never released, and the channel and the order of messages at one tick, without which neither the sustain pedal nor All
Notes Off can be applied. It also loses its place after a system exclusive message. mido takes a third of a
second for a piano performance.
"""

import operator
import struct
from collections.abc import Iterable, Iterator

NOTE_OFF, NOTE_ON, CONTROL_CHANGE = 0x80, 0x90, 0xB0
SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_ALL_CONTROLLERS, ALL_NOTES_OFF = 64, 120, 121, 123
_CONTROLLERS = {SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_ALL_CONTROLLERS, *range(ALL_NOTES_OFF, 128)}
"""124 to 127 switch between omni, mono and poly mode, which implies All Notes Off."""

_SYSTEM, _META, _END_OF_TRACK, _TEMPO = 0xF0, 0xFF, 0x2F, 0x51
_SYSTEM_DATA_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0, 0xF8: 0, 0xFA: 0, 0xFB: 0, 0xFC: 0, 0xFE: 0}
_DEFAULT_TEMPO = 500_000
"""Microseconds per beat, until a file sets another tempo."""
_MAX_SECONDS = 24 * 3600
"""A longer file has damaged times, which would become millions of time shifts."""

Message = tuple[float, int, int, int]
"""Time in seconds, status (kind | channel), pitch or controller, velocity or value."""


def read(content: bytes) -> tuple[list[Message], float]:
  """Returns the note-ons, note-offs and changes of _CONTROLLERS of a MIDI file, and its end in seconds.

  Messages of all tracks are in order of time; those at one tick keep the order of the file. Of everything else only the
  tempo is read, and a tempo of 0 is ignored. A RIFF container (.rmi) is unwrapped.

  Raises ValueError if it is not a complete MIDI file of type 0 or 1 whose times are in ticks per beat, if one of these
  messages has a data byte above 127, or if it lasts more than a day.
  """
  ticks_per_beat, tracks = _split(content)
  events = []
  for number, track in enumerate(tracks, 1):
    try:
      events += _parse(track)
    except IndexError as error:
      raise ValueError(f"track {number} ends in the middle of an event") from error
    except ValueError as error:
      raise ValueError(f"in track {number}, {error}") from error
  # In integers, so that rounding errors do not add up.
  messages, elapsed, last_tick, tempo = [], 0, 0, _DEFAULT_TEMPO
  for tick, status, number, value in sorted(events, key=operator.itemgetter(0)):
    elapsed += (tick - last_tick) * tempo
    last_tick = tick
    if status < _SYSTEM:
      messages.append((elapsed / (1_000_000 * ticks_per_beat), status, number, value))
    elif number == _TEMPO:
      tempo = value
  seconds = elapsed / (1_000_000 * ticks_per_beat)
  if seconds > _MAX_SECONDS:
    raise ValueError(f"it lasts more than {_MAX_SECONDS // 3600} hours, so its times are damaged")
  return messages, seconds


def write(messages: Iterable[tuple[int, int, int, int]]) -> bytes:
  """Returns a MIDI file with one piano track, of messages (milliseconds, kind, pitch, velocity) in order of time."""
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


def _split(content: bytes) -> tuple[int, list[bytes]]:
  """Returns the ticks per beat and the content of each track chunk.

  Other chunks are skipped. Fewer tracks than the header announces are accepted if the file ends after a whole chunk.
  """
  if content[:4] == b"RIFF" and content[8:12] == b"RMID":
    start = content.find(b"MThd", 20)  # after RIFF, size, RMID, data, size
    if start < 0:
      raise ValueError("its RIFF container has no MIDI file")
    content = content[start : start + int.from_bytes(content[start - 4 : start], "little")]
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


def _parse(track: bytes) -> Iterator[tuple[int, int, int, int]]:
  """Yields the messages (tick, status, number, value), tempos (tick, _META, _TEMPO, microseconds) and the end.

  Raises IndexError if the track ends in the middle of an event, ValueError for other damage.
  """
  tick, position, running_status = 0, 0, 0
  while position < len(track):
    delta, position = (track[position], position + 1) if track[position] < 128 else _variable_length(track, position)
    tick += delta
    status = track[position]
    if status >= 128:
      position += 1
    elif not running_status:
      raise ValueError("an event has no status")
    else:
      status = running_status
    if status < _SYSTEM:
      running_status = status  # not cancelled by system exclusive and meta events: many files rely on it
      number = track[position]
      if status < NOTE_ON + 16 or status & 0xF0 == CONTROL_CHANGE and number in _CONTROLLERS:
        value = track[position + 1]
        if number > 127 or value > 127:
          raise ValueError(f"a note or control change has the data byte {max(number, value)}, which is above 127")
        yield tick, status, number, value
      position += 1 if 0xC0 <= status < 0xE0 else 2  # program change and channel pressure: one data byte
    elif status == _META:
      kind = track[position]
      size, position = _variable_length(track, position + 1)
      if kind == _END_OF_TRACK:
        break
      if kind == _TEMPO and size == 3 and any(track[position : position + 3]):
        yield tick, _META, _TEMPO, int.from_bytes(track[position : position + 3])
      position += size
    elif status in (0xF0, 0xF7):  # system exclusive
      size, position = _variable_length(track, position)
      position += size
    elif status in _SYSTEM_DATA_BYTES:
      position += _SYSTEM_DATA_BYTES[status]
    else:
      raise ValueError(f"the status byte {status:#x} is not defined")
  else:
    if position > len(track):
      raise IndexError
  yield tick, _META, _END_OF_TRACK, 0


def _variable_length(track: bytes, position: int) -> tuple[int, int]:
  """Returns the number of 1 to 4 bytes at `position`, 7 bits in each, and the position after it."""
  number = 0
  for end in range(position + 1, position + 5):
    number = number << 7 | track[end - 1] & 0x7F
    if track[end - 1] < 128:
      return number, end
  raise ValueError(f"the number at byte {position} has more than 4 bytes")
