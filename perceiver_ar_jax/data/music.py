"""How played music is laid out as events (Perceiver AR and Music Transformer on MAESTRO); NumPy, and mido for files.

A piece is a list of `Note`s, times in seconds. Its events are 388 values in this order:

  note-on     0..127    the pitch begins, at the velocity last set
  note-off    128..255  the pitch ends
  time shift  256..355  1..100 steps of 10 ms pass
  velocity    356..387  velocities 1..4, 5..8, .., 125..127 for the notes to come

An event id is its value + NUM_SPECIAL. SOS and EOS are the caller's: `encode` writes none, and all that reads ids
passes over them. In the names of arrays N and M count events (in `encode` first notes), P pitches, T steps.

Two notes of one pitch may overlap. Neither MIDI nor the events say which of them a note-off means, so everywhere here
it ends the one that began first.
"""

import collections
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import NUM_SPECIAL

if TYPE_CHECKING:
  import mido

NUM_PITCHES = 128
STEPS_PER_SECOND = 100

_NOTE_ON = 0
_NOTE_OFF = 128
_TIME_SHIFT = 256
_VELOCITY = 356
_NUM_VALUES = 388
_MAX_SHIFT_STEPS = 100
_VELOCITIES_PER_BIN = 4
_UNKNOWN_VELOCITY = 64  # of notes that begin before a crop's first velocity event

VOCAB_SIZE = _NUM_VALUES + NUM_SPECIAL

_SUSTAIN_PEDAL = 64
_PEDAL_DOWN = 64
_PERCUSSION_CHANNEL = 9
_DEFAULT_TEMPO = 500_000  # microseconds per beat until a file says otherwise
_MAX_FILE_SECONDS = 24 * 3600  # beyond, a broken time would become millions of time shifts


class Note(NamedTuple):
  """A pitch 0..127 struck at a velocity 1..127, sounding from onset to offset, both in seconds."""

  pitch: int
  velocity: int
  onset: float
  offset: float


def load_mido():
  """The package that reads and writes MIDI files, an extra; raises InputError where it is not installed."""
  try:
    import mido
  except ImportError as error:
    raise InputError("MIDI files need the package mido, which is not installed: pip install -e '.[music]'.") from error
  return mido


def read_notes(midi: bytes) -> list[Note]:
  """Notes of a MIDI file's bytes, sorted by onset, pitch and offset; an empty list if it holds none.

  All tracks play together, percussion (channel 10) left out, as its numbers are no pitches. While a channel's sustain
  pedal is down, a note that is released sounds on until the pedal is up or its pitch is struck again. A note struck
  again while its key is held goes on, and the next note-off ends the earlier of the two. What is never released ends
  with the file.

  Raises:
    InputError: mido is not installed.
    ValueError: the bytes are no intact MIDI file, its tracks do not play together (type 2), its time is in frames
      (SMPTE) rather than beats, or it claims to last more than a day.
  """
  messages, end_seconds = _timed_messages(midi)
  notes = []
  held = collections.defaultdict(collections.deque)  # (channel, pitch) to (onset, velocity), the earliest first
  sustained = collections.defaultdict(list)  # the same for notes that only the pedal keeps
  pedal_down = set()

  def end(key, begun, now):
    for onset, velocity in begun:
      notes.append(Note(key[1], velocity, onset, now))

  for now, message in messages:
    channel = message.channel
    if message.type == "control_change":
      if message.value >= _PEDAL_DOWN:
        pedal_down.add(channel)
      else:
        pedal_down.discard(channel)
        for key in [key for key in sustained if key[0] == channel]:
          end(key, sustained.pop(key), now)
      continue
    key = (channel, message.note)
    if message.type == "note_on" and message.velocity > 0:
      end(key, sustained.pop(key, ()), now)
      held[key].append((now, message.velocity))
    elif held[key]:
      released = held[key].popleft()
      if channel in pedal_down:
        sustained[key].append(released)
      else:
        end(key, [released], now)

  for unreleased in (held, sustained):
    for key, begun in unreleased.items():
      end(key, begun, end_seconds)
  return sorted(notes, key=_by_time)


def encode(notes: Sequence[Note]) -> np.ndarray:
  """Event ids int32[N] of the notes, in whatever order they come; SOS and EOS are not added.

  Times are rounded to steps of 10 ms from the start of the piece, so that errors do not add up, and a note lasts at
  least one step. At one instant all note-offs come first, then the note-ons, each by pitch; a velocity event stands
  only before a note-on that changes it. The silence before the first note is kept.

  Raises:
    ValueError: a pitch, a velocity or a time out of range.
  """
  if not len(notes):
    return np.zeros(0, np.int32)
  _check(notes)
  fields_4xN = np.array(notes, np.float64).T
  pitches_N, velocities_N = fields_4xN[:2].astype(np.int64)
  onsets_N, offsets_N = np.rint(fields_4xN[2:] * STEPS_PER_SECOND).astype(np.int64)
  offsets_N = np.maximum(offsets_N, onsets_N + 1)

  steps_N = np.concatenate([offsets_N, onsets_N])
  values_N = np.concatenate([_NOTE_OFF + pitches_N, _NOTE_ON + pitches_N])
  bins_N = np.tile((velocities_N - 1) // _VELOCITIES_PER_BIN, 2)
  begins_N = np.arange(values_N.size) >= pitches_N.size
  order_N = np.lexsort([bins_N, values_N, begins_N, steps_N])  # the last key counts most
  steps_N, values_N, bins_N, begins_N = steps_N[order_N], values_N[order_N], bins_N[order_N], begins_N[order_N]

  note_ons = np.flatnonzero(begins_N)
  changes = note_ons[np.diff(bins_N[note_ons], prepend=-1) != 0]
  values_N = np.insert(values_N, changes, _VELOCITY + bins_N[changes])
  steps_N = np.insert(steps_N, changes, steps_N[changes])
  return _with_time_shifts(values_N, steps_N, end_step=steps_N[-1]) + np.int32(NUM_SPECIAL)


def decode(ids_N: Sequence[int]) -> list[Note]:
  """Notes that the event ids play, sorted by onset, pitch and offset.

  Any sequence plays, also a crop out of a piece or what a model has sampled. Ids that are no event (PAD, EOS, SOS, out
  of range) are passed over, as are note-offs of pitches that do not sound; notes never ended end with the sequence; a
  note lasts at least one step. The velocity is the middle of its bin, or 64 before any velocity event.
  """
  steps_N, velocities_N = steps(ids_N), _velocities(_values(ids_N))
  notes = []
  for pitch, on, off in notes_of_events(ids_N):
    onset, offset = int(steps_N[on]), int(steps_N[min(off, steps_N.size - 1)])
    offset = max(offset, onset + 1)
    notes.append(Note(pitch, int(velocities_N[on]), onset / STEPS_PER_SECOND, offset / STEPS_PER_SECOND))
  return sorted(notes, key=_by_time)


def notes_of_events(ids_N: Sequence[int]) -> list[tuple[int, int, int]]:
  """(pitch, on, off) of the notes that `decode` gives: which events begin and end each; N where none ends it."""
  pitches_N, begins_N = pitches(ids_N), _values(ids_N) < _NOTE_OFF
  sounding = [collections.deque() for _ in range(NUM_PITCHES)]  # per pitch the events that began it, earliest first
  result = []
  for event in np.flatnonzero(pitches_N >= 0).tolist():
    begun = sounding[pitches_N[event]]
    if begins_N[event]:
      begun.append(event)
    elif begun:
      result.append((int(pitches_N[event]), begun.popleft(), event))
  return result + [(pitch, on, len(pitches_N)) for pitch in range(NUM_PITCHES) for on in sounding[pitch]]


def steps(ids_N: Sequence[int]) -> np.ndarray:
  """int64[N]: the steps of 10 ms that have passed at each event, a time shift's own included."""
  return np.cumsum(_shift_steps(_values(ids_N)))


def pitches(ids_N: Sequence[int]) -> np.ndarray:
  """int64[N]: the pitch that each event begins or ends, -1 for other events."""
  values_N = _values(ids_N)
  return np.where((values_N >= 0) & (values_N < _TIME_SHIFT), values_N % NUM_PITCHES, -1)


def to_midi(notes: Sequence[Note]) -> bytes:
  """A standard MIDI file of one piano track; its tick is 1 ms, to which times are rounded. A note lasts at least 1 ms.

  `read_notes` gives the same notes back, except that of two notes of one pitch, one within the other, the offsets
  change places.

  Raises:
    InputError: mido is not installed.
    ValueError: a pitch, a velocity or a time out of range.
  """
  mido = load_mido()
  _check(notes)
  events = []
  for pitch, velocity, onset, offset in notes:
    begin_ms = round(onset * 1000)
    events.append((begin_ms, 1, int(pitch), int(velocity)))
    events.append((max(round(offset * 1000), begin_ms + 1), 0, int(pitch), 0))
  events.sort()  # at one instant the ends stand first, so that a repeated note does not end as it begins

  track = mido.MidiTrack(
    [mido.MetaMessage("set_tempo", tempo=_DEFAULT_TEMPO), mido.Message("program_change", program=0)]
  )
  before_ms = 0
  for now_ms, begins, pitch, velocity in events:
    kind = "note_on" if begins else "note_off"
    track.append(mido.Message(kind, note=pitch, velocity=velocity, time=now_ms - before_ms))
    before_ms = now_ms
  file = io.BytesIO()
  mido.MidiFile(type=0, ticks_per_beat=_DEFAULT_TEMPO // 1000, tracks=[track]).save(file=file)
  return file.getvalue()


def transpose(ids_N: Sequence[int], semitones: int) -> np.ndarray:
  """Event ids int32[N] with all pitches moved by `semitones`, negative is down.

  Where that would take a pitch out of 0..127, all move together by as much as fits, so intervals never change.
  """
  values_N = _values(ids_N)
  is_note_N = (values_N >= 0) & (values_N < _TIME_SHIFT)
  if is_note_N.any():
    pitches = values_N[is_note_N] % NUM_PITCHES
    values_N[is_note_N] += np.clip(semitones, -pitches.min(), NUM_PITCHES - 1 - pitches.max())
  return (values_N + NUM_SPECIAL).astype(np.int32)


def stretch(ids_N: Sequence[int], factor: float) -> np.ndarray:
  """Event ids int32[M] of the same music at `factor` times its duration: above 1 is slower.

  Times since the start are multiplied and then rounded, so that errors do not add up. All but the time shifts, SOS and
  EOS included, stays, and in its order, also where two instants become one: below 1 a note-off may thus follow its own
  note-on at once, which `decode` takes for a note of one step.

  Raises:
    ValueError: the factor is not a positive finite number.
  """
  if not (math.isfinite(factor) and factor > 0):
    raise ValueError(f"factor={factor} must be a positive finite number.")
  values_N = _values(ids_N)
  shift_steps_N = _shift_steps(values_N)
  if not shift_steps_N.any():
    return (values_N + NUM_SPECIAL).astype(np.int32)
  steps_N = np.rint(np.cumsum(shift_steps_N) * factor).astype(np.int64)
  stays_N = shift_steps_N == 0
  return _with_time_shifts(values_N[stays_N], steps_N[stays_N], end_step=steps_N[-1]) + np.int32(NUM_SPECIAL)


def piano_roll(ids_N: Sequence[int]) -> np.ndarray:
  """What sounds when: uint8[128, T], the velocity of each pitch in each step of 10 ms, 0 where it is silent.

  Of two notes of one pitch that overlap, the later one shows.
  """
  notes = decode(ids_N)
  spans = [(round(note.onset * STEPS_PER_SECOND), round(note.offset * STEPS_PER_SECOND)) for note in notes]
  num_steps = max([int(_shift_steps(_values(ids_N)).sum()), *(end for _, end in spans)])
  roll_PxT = np.zeros((NUM_PITCHES, num_steps), np.uint8)
  for note, (begin, end) in zip(notes, spans):
    roll_PxT[note.pitch, begin:end] = note.velocity
  return roll_PxT


def _timed_messages(midi: bytes) -> tuple[list[tuple[float, "mido.Message"]], float]:
  """Note and pedal messages of all tracks as (seconds, message) in order of time, and the end of the file in seconds.

  mido can merge tracks itself, but copies every message three times over on the way.
  """
  mido = load_mido()
  try:
    file = mido.MidiFile(file=io.BytesIO(midi), clip=True)
  except EOFError as error:
    raise ValueError("The MIDI file is empty or ends too early.") from error
  except Exception as error:  # mido raises what its parsing happens to meet, with no common parent: struct.error, ..
    raise ValueError(f"Not an intact MIDI file: {type(error).__name__}: {error}.") from error
  if file.type not in (0, 1):
    raise ValueError(f"MIDI files of type {file.type} are not supported, only 0 and 1: their tracks play together.")
  if file.ticks_per_beat <= 0:
    raise ValueError(f"MIDI time division {file.ticks_per_beat} is not supported, only ticks per beat.")

  timed = []
  end_tick = 0
  for track in file.tracks:
    tick = 0
    for message in track:
      tick += message.time
      if message.type == "set_tempo" or _is_heard(message):
        timed.append((tick, message))
    end_tick = max(end_tick, tick)
  timed.sort(key=lambda item: item[0])  # stable: at one tick, messages stay in the order of the file

  # Time is counted in whole microseconds / ticks_per_beat, so that neither rounding nor absurd deltas can spoil it.
  ticks_to_seconds = 1_000_000 * file.ticks_per_beat
  last_tick, elapsed, tempo = 0, 0, _DEFAULT_TEMPO
  messages = []
  for tick, message in timed:
    elapsed += (tick - last_tick) * tempo
    last_tick = tick
    if elapsed > _MAX_FILE_SECONDS * ticks_to_seconds:
      break
    if message.type == "set_tempo":
      tempo = message.tempo
    else:
      messages.append((elapsed / ticks_to_seconds, message))
  elapsed += (end_tick - last_tick) * tempo
  if elapsed > _MAX_FILE_SECONDS * ticks_to_seconds:
    raise ValueError(f"The MIDI file claims to last more than {_MAX_FILE_SECONDS // 3600} hours: its times are broken.")
  return messages, elapsed / ticks_to_seconds


def _is_heard(message: "mido.Message") -> bool:
  """Whether the message begins or ends a note or moves the sustain pedal, on a channel that has pitches."""
  if message.type in ("note_on", "note_off"):
    return message.channel != _PERCUSSION_CHANNEL
  return message.type == "control_change" and message.control == _SUSTAIN_PEDAL


def _by_time(note: Note) -> tuple[float, int, float]:
  return note.onset, note.pitch, note.offset


def _check(notes: Sequence[Note]):
  """Raises ValueError for the first note that has no place in a piece."""
  for note in notes:
    if not (0 <= note[0] < NUM_PITCHES and 1 <= note[1] <= 127 and 0 <= note[2] < math.inf and 0 <= note[3] < math.inf):
      raise ValueError(f"{note} needs a pitch in 0..127, a velocity in 1..127 and finite times from 0 on.")


def _values(ids_N: Sequence[int]) -> np.ndarray:
  """Values int64[N], a copy; specials become negative."""
  return np.array(ids_N, np.int64) - NUM_SPECIAL


def _shift_steps(values_N: np.ndarray) -> np.ndarray:
  """Steps int64[N] that pass at each event: 0 for all but time shifts."""
  return np.where((values_N >= _TIME_SHIFT) & (values_N < _VELOCITY), values_N - _TIME_SHIFT + 1, 0)


def _velocities(values_N: np.ndarray) -> np.ndarray:
  """The velocity int64[N] in force at each event."""
  is_velocity_N = (values_N >= _VELOCITY) & (values_N < _NUM_VALUES)
  last_set_N = np.maximum.accumulate(np.where(is_velocity_N, np.arange(values_N.size), -1))
  middles_N = (values_N[last_set_N] - _VELOCITY) * _VELOCITIES_PER_BIN + 2
  return np.where(last_set_N >= 0, middles_N, _UNKNOWN_VELOCITY)


def _with_time_shifts(values_N: np.ndarray, steps_N: np.ndarray, end_step: int) -> np.ndarray:
  """Values int32[M]: `values_N` with the shifts that bring each to its step, and from the last on to `end_step`.

  A wait is as many shifts of 100 steps as fit, then one for the rest.
  """
  waits = np.diff(steps_N, prepend=0, append=end_step)
  num_shifts = -(-waits // _MAX_SHIFT_STEPS)
  ends = np.cumsum(num_shifts) + np.arange(waits.size)  # where each wait is over: the place of the value it leads to
  values_M = np.full(ends[-1], _TIME_SHIFT + _MAX_SHIFT_STEPS - 1, np.int32)
  values_M[ends[:-1]] = values_N
  waited = num_shifts > 0
  values_M[ends[waited] - 1] = _TIME_SHIFT - 1 + (waits - (num_shifts - 1) * _MAX_SHIFT_STEPS)[waited]
  return values_M
