"""Music: small pieces written out, round trips of random ones, and what broken or sampled input does."""

import io

import mido
import numpy as np
import pytest

from perceiver_ar_jax.data import EOS, NUM_SPECIAL, PAD, SOS, music
from perceiver_ar_jax.data.music import Note

C4, E4, G4 = 60, 64, 67


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


def midi_file(*tracks, ticks_per_beat=500, type=1):
  """Bytes of a MIDI file; by default its ticks are 1 ms. A track is a list of (tick, message name, fields)."""
  file = mido.MidiFile(type=type, ticks_per_beat=ticks_per_beat)
  for events in tracks:
    track, before = file.add_track(), 0
    for tick, kind, fields in events:
      make = mido.MetaMessage if kind in ("set_tempo", "end_of_track") else mido.Message
      track.append(make(kind, time=tick - before, **fields))
      before = tick
  saved = io.BytesIO()
  file.save(file=saved)
  return saved.getvalue()


def strike(tick, pitch, velocity=80, channel=0):
  return tick, "note_on", {"note": pitch, "velocity": velocity, "channel": channel}


def release(tick, pitch, channel=0):
  return tick, "note_off", {"note": pitch, "channel": channel}


def pedal(tick, value, channel=0):
  return tick, "control_change", {"control": 64, "value": value, "channel": channel}


def end_of_track(tick):
  return tick, "end_of_track", {}


def random_piece(seed, size=300):
  """Notes on no grid at all, repeated and overlapping ones of one pitch, chords, and silences of several seconds."""
  rng = np.random.default_rng(seed)
  gaps = rng.choice([0, 0.013, 0.2, 3], size, p=[0.3, 0.3, 0.35, 0.05]) * rng.random(size)
  onsets = rng.uniform(0, 3) + np.cumsum(gaps)
  offsets = onsets + rng.exponential(0.4, size) + 0.01
  pitches, velocities = rng.integers(0, 128, size), rng.integers(1, 128, size)
  pitches[::2] = rng.integers(60, 64, len(pitches[::2]))
  return [Note(int(p), int(v), float(on), float(off)) for p, v, on, off in zip(pitches, velocities, onsets, offsets)]


def times(notes, pitch):
  """Onsets and offsets of a pitch, both sorted: which of two overlapping notes ends first is no part of a piece."""
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
  assert music.read_notes(music.to_midi([])) == []
  assert music.transpose([], 3).shape == music.stretch([], 2.0).shape == (0,)
  assert music.piano_roll([]).shape == (128, 0)


@pytest.mark.parametrize(
  "note",
  [Note(128, 80, 0, 1), Note(-1, 80, 0, 1), Note(C4, 0, 0, 1), Note(C4, 128, 0, 1)]
  + [Note(C4, 80, -0.1, 1), Note(C4, 80, float("nan"), 1), Note(C4, 80, 0, float("inf")), Note(C4, 80, 0, -1)],
)
@pytest.mark.parametrize("write", [music.encode, music.to_midi])
def test_notes_out_of_range_are_named(write, note):
  with pytest.raises(ValueError, match=f"pitch={note.pitch}, velocity={note.velocity}.*needs"):
    write([Note(C4, 80, 0, 1), note])


def test_decode_crop():
  """No velocity yet, a note-off of a note before the crop, a note that goes on after it."""
  crop = ids(wait(10), off(E4), on(C4), wait(20), velocity_bin(0), on(G4), wait(30))
  assert music.decode(crop) == [Note(C4, 64, 0.1, 0.6), Note(G4, 2, 0.3, 0.6)]


def test_decode_overlap_ends_the_earlier_note():
  overlap = ids(velocity_bin(0), on(C4), wait(1), velocity_bin(1), on(C4), wait(1), off(C4), wait(1), off(C4), off(C4))
  assert music.decode(overlap) == [Note(C4, 2, 0.0, 0.02), Note(C4, 6, 0.01, 0.03)]


def test_decode_passes_over_specials():
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


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_through_midi(seed):
  notes = random_piece(seed)
  assert_same_piece(music.read_notes(music.to_midi(notes)), notes, within_seconds=0.000501, within_velocity=0)


def test_midi_of_whole_milliseconds_is_exact():
  notes = [Note(C4, 80, 0.5, 0.75), Note(G4, 1, 0.5, 1.001), Note(C4, 127, 0.75, 0.751)]
  assert music.read_notes(music.to_midi(notes)) == notes


def test_midi_note_lasts_a_millisecond():
  assert music.read_notes(music.to_midi([Note(C4, 80, 0.5, 0.5)])) == [Note(C4, 80, 0.5, 0.501)]


def test_midi_ends_a_note_before_it_is_struck_again():
  """A player that hears the note-off second would silence the new note."""
  file = mido.MidiFile(file=io.BytesIO(music.to_midi([Note(C4, 80, 0, 0.1), Note(C4, 80, 0.1, 0.2)])))
  assert [m.type for m in file.tracks[0] if "note" in m.type] == ["note_on", "note_off", "note_on", "note_off"]


def test_read_notes_honours_tempo_across_tracks():
  """100 ticks per beat: 0.5 s per beat at first, 1 s from tick 100 on, which falls into the note."""
  tempo = [(100, "set_tempo", {"tempo": 1_000_000})]
  midi = midi_file(tempo, [strike(50, C4), release(200, C4)], ticks_per_beat=100)
  assert music.read_notes(midi) == [Note(C4, 80, 0.25, 1.5)]


def test_read_notes_velocity_0_releases():
  assert music.read_notes(midi_file([strike(0, C4), strike(100, C4, velocity=0)])) == [Note(C4, 80, 0.0, 0.1)]


def test_read_notes_merges_tracks_in_order():
  midi = midi_file([strike(100, G4), release(200, G4)], [strike(0, E4), strike(100, C4), release(200, E4)])
  assert music.read_notes(midi) == [Note(E4, 80, 0.0, 0.2), Note(C4, 80, 0.1, 0.2), Note(G4, 80, 0.1, 0.2)]


def test_read_notes_pedal():
  """G4 is let go under the pedal and sounds until it is up; C4 is still held then; E4 came after."""
  track = [pedal(0, 64), strike(100, C4), strike(100, G4), release(200, G4), pedal(300, 63)]
  track += [release(400, C4), strike(500, E4), release(600, E4)]
  expected = [Note(C4, 80, 0.1, 0.4), Note(G4, 80, 0.1, 0.3), Note(E4, 80, 0.5, 0.6)]
  assert music.read_notes(midi_file(track)) == expected


def test_read_notes_pedal_holds_until_struck_again():
  track = [pedal(0, 127), strike(0, C4, 70), release(100, C4), strike(200, C4, 90), release(250, C4), pedal(500, 0)]
  assert music.read_notes(midi_file(track)) == [Note(C4, 70, 0.0, 0.2), Note(C4, 90, 0.2, 0.5)]


def test_read_notes_pedal_is_of_its_channel():
  track = [pedal(0, 127, channel=1), strike(0, C4), strike(0, G4, channel=1), release(100, C4)]
  track += [release(100, G4, channel=1), strike(200, G4), release(300, G4), pedal(400, 0), end_of_track(900)]
  expected = [Note(C4, 80, 0.0, 0.1), Note(G4, 80, 0.0, 0.9), Note(G4, 80, 0.2, 0.3)]
  assert music.read_notes(midi_file(track)) == expected


def test_read_notes_overlap_ends_the_earlier_note():
  track = [strike(0, C4, 70), strike(100, C4, 90), release(200, C4), release(300, C4), release(400, C4)]
  assert music.read_notes(midi_file(track)) == [Note(C4, 70, 0.0, 0.2), Note(C4, 90, 0.1, 0.3)]


def test_read_notes_unreleased_end_with_the_file():
  track = [strike(0, C4), strike(100, G4), end_of_track(700)]
  assert music.read_notes(midi_file(track)) == [Note(C4, 80, 0.0, 0.7), Note(G4, 80, 0.1, 0.7)]


def test_read_notes_leaves_percussion_out():
  drums = [strike(0, 36, channel=9), release(100, 36, channel=9)]
  assert music.read_notes(midi_file(drums)) == []
  assert music.read_notes(midi_file(drums, [strike(0, C4), release(100, C4)])) == [Note(C4, 80, 0.0, 0.1)]


PIECE = midi_file([strike(0, C4), pedal(50, 127), release(100, C4), strike(200, G4), release(300, G4)], type=0)
BAD_KEY = b"MThd\0\0\0\6\0\0\0\1\0\x60" + b"MTrk\0\0\0\6" + b"\0\xff\x59\2\x40\0"


@pytest.mark.parametrize(
  "midi,reason",
  [
    (b"", "empty or ends too early"),
    (PIECE[:-20], "empty or ends too early"),
    (b"A photograph of a piano.", "Not an intact MIDI file"),
    (BAD_KEY, "Not an intact MIDI file: KeySignatureError"),
    (midi_file([strike(0, C4)], [strike(0, C4)], type=2), "type 2"),
    (PIECE[:12] + b"\xe7\x28" + PIECE[14:], "time division"),
    (PIECE[:12] + b"\0\0" + PIECE[14:], "time division 0"),
    (midi_file([strike(0, C4), release(24 * 3600 * 1000 + 1, C4)]), "24 hours"),
    (midi_file([strike(0, C4), end_of_track(10**400)]), "24 hours"),
  ],
)
def test_read_notes_says_what_is_broken(midi, reason):
  with pytest.raises(ValueError, match=reason):
    music.read_notes(midi)


@pytest.mark.parametrize("length", range(len(PIECE)))
def test_read_notes_truncated(length):
  with pytest.raises(ValueError):
    music.read_notes(PIECE[:length])


@pytest.mark.parametrize("position", range(len(PIECE)))
def test_read_notes_damaged(position):
  """Whatever byte is wrong: the file is read, or is a ValueError."""
  for byte in [0, 1, 0x59, 0x7F, 0x80, 0xC0, 0xF0, 0xFF]:
    try:
      notes = music.read_notes(PIECE[:position] + bytes([byte]) + PIECE[position + 1 :])
    except ValueError:
      continue
    assert all(0 <= n.pitch < 128 and 1 <= n.velocity <= 127 and n.offset >= n.onset >= 0 for n in notes)


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
def test_transpose_moves_by_what_fits(semitones, pitches):
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


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_stretch_refuses_factor(factor):
  with pytest.raises(ValueError, match="positive finite"):
    music.stretch(ids(wait(5)), factor)


def test_piano_roll():
  piece = [SOS, *ids(wait(1), velocity_bin(0), on(C4), wait(1), velocity_bin(1), on(G4), wait(2), off(C4)), EOS]
  roll = music.piano_roll(piece + ids(wait(1)))
  assert roll.dtype == np.uint8
  assert roll.shape == (128, 5)
  assert roll[C4].tolist() == [0, 2, 2, 2, 0]
  assert roll[G4].tolist() == [0, 0, 6, 6, 6]
  assert roll.sum() == 2 * 3 + 6 * 3
