"""Music to test with: three pitches, random notes, notes of files, and a comparison of two lists of notes."""

import numpy as np

from perceiver_ar_jax.data import music
from perceiver_ar_jax.data.music import Note

C4, E4, G4 = 60, 64, 67


def random_piece(seed, size=300):
  """Notes on no grid at all, repeated and overlapping ones of one pitch, chords, and silences of several seconds."""
  rng = np.random.default_rng(seed)
  gaps = rng.choice([0, 0.013, 0.2, 3], size, p=[0.3, 0.3, 0.35, 0.05]) * rng.random(size)
  onsets = rng.uniform(0, 3) + np.cumsum(gaps)
  offsets = onsets + rng.exponential(0.4, size) + 0.01
  pitches, velocities = rng.integers(0, 128, size), rng.integers(1, 128, size)
  pitches[::2] = rng.integers(60, 64, len(pitches[::2]))
  return [Note(int(p), int(v), float(on), float(off)) for p, v, on, off in zip(pitches, velocities, onsets, offsets)]


def read_notes(midi):
  """The notes of a MIDI file as a list."""
  return [Note(*note) for note in music.read_notes(midi).tolist()]


def times(notes, pitch):
  """Onsets and offsets of a pitch, both sorted: which of two overlapping notes ends first does not matter."""
  return np.sort([(n.onset, n.offset) for n in notes if n.pitch == pitch], axis=0)


def velocities(notes, pitch):
  """Velocities of a pitch, by onset."""
  return np.array([n.velocity for n in sorted(notes, key=lambda n: n.onset) if n.pitch == pitch])


def assert_same_piece(got, expected, within_seconds, within_velocity):
  assert sorted(n.pitch for n in got) == sorted(n.pitch for n in expected)
  compared = 0
  for pitch in {n.pitch for n in expected}:
    np.testing.assert_allclose(times(got, pitch), times(expected, pitch), rtol=0, atol=within_seconds)
    # Notes struck in one step may change places: velocities are compared where the onset tells notes apart.
    gaps = np.diff(times(expected, pitch)[:, 0], prepend=-1, append=np.inf)
    alone = np.minimum(gaps[1:], gaps[:-1]) > 0.02
    differences = abs(velocities(got, pitch) - velocities(expected, pitch))
    assert max(differences[alone], default=0) <= within_velocity
    compared += alone.sum()
  assert compared > len(expected) / 2
