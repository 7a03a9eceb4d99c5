"""Music as event ids, the vocabulary of Perceiver AR and Music Transformer on MAESTRO, and as notes of MIDI files.

A piece is a list of `Note`s with times in seconds. Its events are 388 values in this order:

  note-on     0..127    the pitch begins, at the velocity last set
  note-off    128..255  the pitch ends
  time shift  256..355  1..100 steps of 10 ms pass
  velocity    356..387  velocities 1..4, 5..8, .., 125..127 for the notes that follow

An event id is its value + NUM_SPECIAL. SOS and EOS are added by the caller: `encode` writes neither, and functions that
read ids skip them. In array names N and M count events. Two notes of one pitch may overlap: a note-off ends the one
that began first, which neither MIDI nor the events state.
"""

import collections
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from perceiver_ar_jax.data import NUM_SPECIAL, midi

NUM_PITCHES = 128
STEPS_PER_SECOND = 100
_NOTE_ON, _NOTE_OFF, _TIME_SHIFT, _VELOCITY, _NUM_VALUES = 0, 128, 256, 356, 388
_MAX_SHIFT_STEPS = 100
_VELOCITIES_PER_BIN = 4
_UNKNOWN_VELOCITY = 64  # for notes that begin before the first velocity event of a crop
VOCAB_SIZE = _NUM_VALUES + NUM_SPECIAL
_PEDAL_DOWN, _PERCUSSION_CHANNEL = 64, 9
_NUM_KEYS = 16 * NUM_PITCHES  # pitches of all channels


class Note(NamedTuple):
  """A pitch 0..127 at a velocity 1..127 that sounds from onset to offset, both in seconds."""

  pitch: int
  velocity: int
  onset: float
  offset: float


def read_notes(content: bytes) -> np.ndarray:
  """Returns the notes of a MIDI file sorted by onset, pitch and offset: float64[N, 4], rows with the fields of `Note`.

  All tracks play together. Percussion (channel 10) is left out because its numbers are not pitches. While the sustain
  pedal of a channel is down, a released note sounds until the pedal is up or its pitch is struck again. A note struck
  again while its key is held continues, and the next note-off ends the earlier of the two. All Sound Off and All Notes
  Off end every note of the channel, and Reset All Controllers lifts its pedal. A note that is never released ends with
  the file. Raises ValueError as midi.read.
  """
  times_M, (statuses_M, numbers_M, values_M), end_time = midi.read(content)
  channels_M, is_control_M = statuses_M & 0x0F, statuses_M >= midi.CONTROL_CHANGE
  is_pedal_M = is_control_M & np.isin(numbers_M, (midi.SUSTAIN_PEDAL, midi.RESET_ALL_CONTROLLERS))
  is_down_M = is_pedal_M & (numbers_M == midi.SUSTAIN_PEDAL) & (values_M >= _PEDAL_DOWN)
  is_note_M = ~is_control_M & (channels_M != _PERCUSSION_CHANNEL)
  is_struck_M = is_note_M & (statuses_M >= midi.NOTE_ON) & (values_M > 0)
  keys_M = channels_M * NUM_PITCHES + numbers_M

  # Messages are referred to by their index, the end of the file by M.
  note_messages = np.flatnonzero(is_note_M)
  all_off = _neighbors(is_control_M & ~is_pedal_M, channels_M, note_messages)
  # The note-offs after a message that ends all notes belong to the notes after it.
  ons, offs = _pair(all_off * _NUM_KEYS + keys_M[note_messages], is_struck_M[note_messages])
  ends_N = np.append(note_messages, len(times_M))[offs]
  last_N, ons_N = all_off[ons], note_messages[ons]
  released = np.flatnonzero(ends_N < len(times_M))
  pedals = _neighbors(is_pedal_M, channels_M, ends_N[released], before=True)
  held = released[np.append(is_down_M, False)[pedals]]
  pedal_up = _neighbors(is_pedal_M & ~is_down_M, channels_M, ends_N[held])
  ends_N[held] = np.minimum(pedal_up, _neighbors(is_struck_M, keys_M, ends_N[held]))
  offsets_N = np.append(times_M, end_time)[np.minimum(ends_N, last_N)]
  notes_Nx4 = np.stack([numbers_M[ons_N], values_M[ons_N], times_M[ons_N], offsets_N], axis=1)
  return notes_Nx4.take(np.lexsort((offsets_N, numbers_M[ons_N], times_M[ons_N])), axis=0)


def _neighbors(is_set_M: np.ndarray, keys_M: np.ndarray, messages: np.ndarray, before: bool = False) -> np.ndarray:
  """Returns, for each of `messages`, the next message with its key that is set, or the last one before; M if none."""
  size = len(keys_M) + 1
  places_M = keys_M.astype(np.int64) * size + np.arange(len(keys_M))
  ends = np.arange(1, _NUM_KEYS + 1) * size - 1  # of each key: M
  places = np.sort(np.concatenate([places_M[is_set_M], ends]))
  return places[np.searchsorted(places, places_M[messages]) - before] % size


def _pair(keys_M: np.ndarray, begins_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the events that begin notes, and those that end each one, the earliest of its key first; M if none does."""
  sounding, ends = collections.defaultdict(collections.deque), [len(keys_M)] * len(keys_M)
  for event, (key, begins) in enumerate(zip(keys_M.tolist(), begins_M.tolist())):
    if begins:
      sounding[key].append(event)
    elif sounding[key]:
      ends[sounding[key].popleft()] = event
  return np.flatnonzero(begins_M), np.array(ends, np.int64)[begins_M]


def encode(notes: Sequence[Note] | np.ndarray) -> np.ndarray:
  """Returns the event ids int32[N] of notes in any order, without SOS and EOS.

  Times since the start of the piece are rounded to steps of 10 ms, so that errors do not add up, and a note lasts at
  least one step. At one time all note-offs come first, then the note-ons, each sorted by pitch; a velocity event
  precedes only a note-on that changes the velocity. The silence before the first note is kept.
  """
  pitches_N, velocities_N, onsets_N, offsets_N = np.array(notes, np.float64).reshape(-1, 4).T
  first_N = np.rint(onsets_N * STEPS_PER_SECOND).astype(np.int64)
  last_N = np.maximum(np.rint(offsets_N * STEPS_PER_SECOND).astype(np.int64), first_N + 1)
  bins_N, pitches_N = ((velocities_N - 1) // _VELOCITIES_PER_BIN).astype(np.int64), pitches_N.astype(np.int64)
  # One number for each event, in the order of the events: step, whether a note begins, pitch, velocity.
  offs_N, ons_N = last_N << 13 | pitches_N << 5, first_N << 13 | 1 << 12 | pitches_N << 5 | bins_N
  events_M = np.sort(np.concatenate([offs_N, ons_N]))
  steps_M, begins_M, pitches_M, bins_M = events_M >> 13, events_M >> 12 & 1, events_M >> 5 & 127, events_M & 31
  values_M = np.where(begins_M, _NOTE_ON, _NOTE_OFF) + pitches_M
  begin_N = np.flatnonzero(begins_M)
  changed = begin_N[np.diff(bins_M[begin_N], prepend=-1) != 0]  # note-ons that need a velocity event
  values_M = np.insert(values_M, changed, _VELOCITY + bins_M[changed])
  steps_M = np.insert(steps_M, changed, steps_M[changed])
  return _with_time_shifts(values_M, steps_M, end_step=steps_M.max(initial=0))


def decode(ids_N: Sequence[int]) -> list[Note]:
  """Returns the notes of event ids, sorted by onset, pitch and offset.

  Any sequence is valid: a crop of a piece, a sample. Ids that are not events (PAD, EOS, SOS, out of range) are ignored,
  and so are note-offs of pitches that do not sound. Notes that are never ended end with the sequence, and a note lasts
  at least one step. Velocities are the middle of their bin, or 64 before the first velocity event.
  """
  steps_N, values_N = steps(ids_N), _values(ids_N)
  is_velocity_N = (values_N >= _VELOCITY) & (values_N < _NUM_VALUES)
  last_set_N = np.maximum.accumulate(np.where(is_velocity_N, np.arange(values_N.size), -1))
  middles_N = (values_N[last_set_N] - _VELOCITY) * _VELOCITIES_PER_BIN + 2
  velocities_N = np.where(last_set_N >= 0, middles_N, _UNKNOWN_VELOCITY)
  notes = []
  for pitch, on, off in notes_of_events(ids_N):
    onset = int(steps_N[on])
    offset = max(int(steps_N[min(off, steps_N.size - 1)]), onset + 1)
    notes.append(Note(pitch, int(velocities_N[on]), onset / STEPS_PER_SECOND, offset / STEPS_PER_SECOND))
  return sorted(notes, key=operator.attrgetter("onset", "pitch", "offset"))


def notes_of_events(ids_N: Sequence[int]) -> list[tuple[int, int, int]]:
  """Returns (pitch, on, off) of the notes of `decode`: the numbers of the events that begin and end each one, or N."""
  pitches_N, begins_N = pitches(ids_N), _values(ids_N) < _NOTE_OFF
  events = np.flatnonzero(pitches_N >= 0)
  ons, offs = _pair(pitches_N[events], begins_N[events])
  ons_K, offs_K = events[ons], np.append(events, len(pitches_N))[offs]
  return list(zip(pitches_N[ons_K].tolist(), ons_K.tolist(), offs_K.tolist()))


def steps(ids_N: Sequence[int]) -> np.ndarray:
  """Returns int64[N]: the steps of 10 ms that have passed after each event."""
  return np.cumsum(_shift_steps(_values(ids_N)))


def pitches(ids_N: Sequence[int]) -> np.ndarray:
  """Returns int64[N]: the pitch that each event begins or ends, -1 for other events."""
  values_N = _values(ids_N)
  return np.where((values_N >= 0) & (values_N < _TIME_SHIFT), values_N % NUM_PITCHES, -1)


def transpose(ids_N: Sequence[int], semitones: int) -> np.ndarray:
  """Returns the event ids int32[N] with all pitches shifted by `semitones`, down if negative.

  Where a pitch would leave 0..127, all pitches are shifted by the largest amount that fits, so intervals never change.
  """
  values_N, pitches_N = _values(ids_N), pitches(ids_N)
  is_note_N = pitches_N >= 0
  if is_note_N.any():
    values_N[is_note_N] += np.clip(semitones, -pitches_N[is_note_N].min(), NUM_PITCHES - 1 - pitches_N.max())
  return (values_N + NUM_SPECIAL).astype(np.int32)


def stretch(ids_N: Sequence[int], factor: float) -> np.ndarray:
  """Returns the event ids int32[M] of the same music at `factor` times its duration; above 1 is slower.

  Times since the start are multiplied and then rounded, so that errors do not add up. Only time shifts change; all
  other events, SOS and EOS included, keep their order: a note-off may follow its own note-on at once, which `decode`
  reads as a note of one step.
  """
  values_N = _values(ids_N)
  kept_N = _shift_steps(values_N) == 0
  steps_N = np.rint(steps(ids_N) * factor).astype(np.int64)
  return _with_time_shifts(values_N[kept_N], steps_N[kept_N], end_step=steps_N.max(initial=0))


def _values(ids_N: Sequence[int]) -> np.ndarray:
  """Returns the values int64[N] of event ids, negative for PAD, EOS and SOS; always a copy."""
  return np.array(ids_N, np.int64) - NUM_SPECIAL


def _shift_steps(values_N: np.ndarray) -> np.ndarray:
  """Returns the steps int64[N] of each time shift, 0 for other events."""
  return np.where((values_N >= _TIME_SHIFT) & (values_N < _VELOCITY), values_N - _TIME_SHIFT + 1, 0)


def _with_time_shifts(values_N: np.ndarray, steps_N: np.ndarray, end_step: int) -> np.ndarray:
  """Returns ids int32[M]: the values and time shifts, so that each value is at its step and the end at `end_step`."""
  waits = np.diff(steps_N, prepend=0, append=end_step)
  num_shifts = -(-waits // _MAX_SHIFT_STEPS)  # of 100 steps, but for the last one
  ends = np.cumsum(num_shifts) + np.arange(waits.size)  # the index of the value after each wait
  values_M = np.full(ends[-1], _TIME_SHIFT + _MAX_SHIFT_STEPS - 1, np.int32)
  values_M[ends[:-1]] = values_N
  waited = num_shifts > 0
  values_M[ends[waited] - 1] = _TIME_SHIFT - 1 + (waits - (num_shifts - 1) * _MAX_SHIFT_STEPS)[waited]
  return values_M + np.int32(NUM_SPECIAL)
