"""Music as events: small examples, round trips of random music, and augmentation."""

import numpy as np
import pytest

from perceiver_ar_jax.data import EOS, NUM_SPECIAL, PAD, SOS, midi, music
from perceiver_ar_jax.data.music import Note
from tests.notes import C4, E4, G4, assert_same_piece, random_piece, read_notes, times


def ids(*values):
  return [value + NUM_SPECIAL for value in values]


def on(pitch):
  return pitch


def off(pitch):
  return 128 + pitch


def wait(steps):
  return 255 + steps


def velocity_bin(number):
  return 356 + number


def test_vocabulary_is_the_published_one():
  assert music.VOCAB_SIZE == 3 + 388


def test_encode_chord():
  chord = [Note(G4, 80, 0.5, 1.0), Note(C4, 80, 0.5, 1.5), Note(E4, 90, 0.5, 1.0)]
  expected = ids(
    wait(50), velocity_bin(19), on(C4), velocity_bin(22), on(E4), velocity_bin(19), on(G4),
    wait(50), off(E4), off(G4),
    wait(50), off(C4),
  )  # fmt: skip
  encoded = music.encode(chord)
  assert encoded.dtype == np.int32
  assert encoded.tolist() == expected
  assert music.decode(encoded) == [Note(C4, 78, 0.5, 1.5), Note(E4, 90, 0.5, 1.0), Note(G4, 78, 0.5, 1.0)]


def test_encode_note_offs_before_note_ons():
  repeated = [Note(C4, 80, 0, 0.1), Note(C4, 80, 0.1, 0.2), Note(50, 80, 0.1, 0.2)]
  expected = ids(velocity_bin(19), on(C4), wait(10), off(C4), on(50), on(C4), wait(10), off(50), off(C4))
  assert music.encode(repeated).tolist() == expected


def test_encode_long_silence():
  """Silences are shifts of 1 s and a rest, none if nothing is left; the initial one is kept."""
  encoded = music.encode([Note(C4, 1, 2.345001, 4.345001)])
  expected = ids(wait(100), wait(100), wait(35), velocity_bin(0), on(C4), wait(100), wait(100), off(C4))
  assert encoded.tolist() == expected


def test_encode_lasts_a_step():
  assert music.encode([Note(C4, 1, 0, 0.001)]).tolist() == ids(velocity_bin(0), on(C4), wait(1), off(C4))


def test_encode_does_not_drift():
  """1000 notes 14 ms apart: rounding every gap would lose 4 s."""
  notes = [Note(C4, 80, 0.014 * i, 0.014 * i + 0.01) for i in range(1000)]
  assert music.decode(music.encode(notes))[-1].onset == pytest.approx(0.014 * 999, abs=0.0051)


def test_encode_order_of_notes_does_not_matter():
  notes = random_piece(0)
  np.testing.assert_array_equal(music.encode(notes[::-1]), music.encode(notes))


@pytest.mark.parametrize(
  "velocity,number,middle",
  [(1, 0, 2), (4, 0, 2), (5, 1, 6), (64, 15, 62), (65, 16, 66), (124, 30, 122), (125, 31, 126), (127, 31, 126)],
)
def test_velocity_bins(velocity, number, middle):
  encoded = music.encode([Note(C4, velocity, 0, 1)])
  assert encoded[0] == ids(velocity_bin(number))[0]
  assert music.decode(encoded)[0].velocity == middle


def test_nothing_is_nothing():
  assert music.encode([]).shape == (0,)
  assert music.decode([]) == []
  assert read_notes(midi.write([])) == []
  assert music.transpose([], 3).shape == music.stretch([], 2.0).shape == (0,)


def test_decode_crop():
  """No velocity yet, a note-off of a note before the crop, a note that ends after it."""
  crop = ids(wait(10), off(E4), on(C4), wait(20), velocity_bin(0), on(G4), wait(30))
  assert music.decode(crop) == [Note(C4, 64, 0.1, 0.6), Note(G4, 2, 0.3, 0.6)]


def test_decode_overlap_ends_the_earlier_note():
  overlap = ids(velocity_bin(0), on(C4), wait(1), velocity_bin(1), on(C4), wait(1), off(C4), wait(1), off(C4), off(C4))
  assert music.decode(overlap) == [Note(C4, 2, 0.0, 0.02), Note(C4, 6, 0.01, 0.03)]


def test_decode_ignores_specials():
  piece = ids(velocity_bin(0), on(C4), wait(5), off(C4))
  with_specials = [SOS, piece[0], PAD, piece[1], EOS, piece[2], PAD, piece[3], EOS, PAD]
  assert music.decode(with_specials) == music.decode(piece) == [Note(C4, 2, 0.0, 0.05)]


@pytest.mark.parametrize("seed", range(5))
def test_decode_garbage(seed):
  """Any ids play, and what they play is a piece like any other."""
  garbage = np.random.default_rng(seed).integers(-10, music.VOCAB_SIZE + 10, 2000)
  notes = music.decode(garbage)
  assert notes == sorted(notes, key=lambda n: (n.onset, n.pitch, n.offset))
  assert len(notes) == np.count_nonzero((garbage >= 3) & (garbage < 131))
  assert all(0 <= n.pitch < 128 and 1 <= n.velocity <= 127 and n.offset > n.onset for n in notes)
  assert_same_piece(music.decode(music.encode(notes)), notes, within_seconds=1e-9, within_velocity=2)


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_through_events(seed):
  notes = random_piece(seed)
  encoded = music.encode(notes)
  assert encoded.min() >= NUM_SPECIAL and encoded.max() < music.VOCAB_SIZE
  decoded = music.decode(encoded)
  assert_same_piece(decoded, notes, within_seconds=0.0100001, within_velocity=2)
  np.testing.assert_array_equal(music.encode(decoded), encoded)


def test_transpose():
  piece = [SOS, *ids(velocity_bin(3), on(C4), wait(5), off(C4), on(E4), wait(5), off(E4)), EOS]
  higher = [SOS, *ids(velocity_bin(3), on(C4 + 2), wait(5), off(C4 + 2), on(E4 + 2), wait(5), off(E4 + 2)), EOS]
  assert music.transpose(piece, 2).tolist() == higher
  assert music.transpose(higher, -2).tolist() == piece
  assert music.transpose(piece, 0).tolist() == piece


@pytest.mark.parametrize(
  "semitones,pitches",
  [(-3, [1, 119]), (-4, [0, 118]), (-5, [0, 118]), (5, [9, 127]), (8, [9, 127]), (1000, [9, 127])],
)
def test_transpose_is_limited_to_the_range(semitones, pitches):
  piece = ids(on(4), on(122), off(4), off(122))
  low, high = pitches
  assert music.transpose(piece, semitones).tolist() == ids(on(low), on(high), off(low), off(high))


def test_transpose_leaves_its_input():
  piece = np.array(ids(on(C4)), np.int32)
  music.transpose(piece, 5)
  assert piece.tolist() == ids(on(C4))


def test_stretch():
  piece = [SOS, *ids(wait(100), wait(20), velocity_bin(3), on(C4), wait(50), off(C4), wait(10)), EOS, PAD]
  slower = [SOS, *ids(*[wait(100)] * 2, wait(40), velocity_bin(3), on(C4), wait(100), off(C4), wait(20)), EOS, PAD]
  assert music.stretch(piece, 2).tolist() == slower
  assert music.stretch(slower, 0.5).tolist() == piece
  assert music.stretch(piece[:-2], 2).tolist() == slower[:-2]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_stretch_without_time_shifts(factor):
  piece = [SOS, *ids(velocity_bin(3), on(C4), off(C4)), EOS]
  assert music.stretch(piece, factor).tolist() == piece


def test_stretch_by_1_changes_nothing():
  encoded = music.encode(random_piece(1))
  np.testing.assert_array_equal(music.stretch(encoded, 1.0), encoded)


@pytest.mark.parametrize("factor", [0.95, 0.975, 1.025, 1.05, 1.7])
def test_stretch_does_not_drift(factor):
  notes = music.decode(music.encode(random_piece(2)))
  stretched = music.decode(music.stretch(music.encode(notes), factor))
  assert {n.pitch for n in stretched} == {n.pitch for n in notes}
  for pitch in {n.pitch for n in notes}:
    # Half a step of rounding, and the step that a note lasts at least.
    np.testing.assert_allclose(times(stretched, pitch), times(notes, pitch) * factor, rtol=0, atol=0.0151)
