"""Music: small pieces written out, round trips of random ones, and what broken or sampled input does."""

import numpy as np
import pytest
import symusic

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


def number(value):
  """A variable-length quantity."""
  high = [0x80 | value >> shift & 0x7F for shift in range(63, 0, -7) if value >> shift]
  return bytes([*high, value & 0x7F])


def chunk(name, content):
  return name + len(content).to_bytes(4) + content


def header(num_tracks, ticks_per_beat=500, file_type=1):
  return chunk(b"MThd", b"".join(field.to_bytes(2) for field in (file_type, num_tracks, ticks_per_beat)))


def track_chunk(events):
  """A track of (tick, bytes of an event)."""
  ticks = [0, *(tick for tick, _ in events)]
  content = b"".join(number(tick - before) + event for before, (tick, event) in zip(ticks, events))
  return chunk(b"MTrk", content if content.endswith(b"\xff\x2f\0") else content + b"\0\xff\x2f\0")


def midi_file(*tracks, **settings):
  """Bytes of a MIDI file; by default its ticks are 1 ms. A track is a list of (tick, bytes of an event)."""
  return header(len(tracks), **settings) + b"".join(map(track_chunk, tracks))


def strike(tick, pitch, velocity=80, channel=0):
  return tick, bytes([0x90 | channel, pitch, velocity])


def release(tick, pitch, channel=0):
  return tick, bytes([0x80 | channel, pitch, 64])


def control(tick, controller, value=0, channel=0):
  return tick, bytes([0xB0 | channel, controller, value])


def pedal(tick, value, channel=0):
  return control(tick, 64, value, channel)


def meta(tick, kind, content=b""):
  return tick, bytes([0xFF, kind]) + number(len(content)) + content


def tempo(tick, microseconds):
  return meta(tick, 0x51, microseconds.to_bytes(3))


def end_of_track(tick):
  return meta(tick, 0x2F)


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


@pytest.mark.parametrize("seed", range(3))
def test_encode_midi_is_encode_of_the_notes(seed):
  midi = music.to_midi(random_piece(seed))
  np.testing.assert_array_equal(music.encode_midi(midi), music.encode(music.read_notes(midi)))
  assert music.encode_midi(music.to_midi([])).shape == (0,)


def test_midi_of_whole_milliseconds_is_exact():
  notes = [Note(C4, 80, 0.5, 0.75), Note(G4, 1, 0.5, 1.001), Note(C4, 127, 0.75, 0.751)]
  assert music.read_notes(music.to_midi(notes)) == notes


def test_midi_note_lasts_a_millisecond():
  assert music.read_notes(music.to_midi([Note(C4, 80, 0.5, 0.5)])) == [Note(C4, 80, 0.5, 0.501)]


def test_midi_ends_a_note_before_it_is_struck_again():
  """A player that receives the note-off second would silence the new note."""
  events = b"".join([bytes([0x90, C4, 80, 100, 0x80, C4, 0]), bytes([0, 0x90, C4, 80, 100, 0x80, C4, 0])])
  assert events in music.to_midi([Note(C4, 80, 0, 0.1), Note(C4, 80, 0.1, 0.2)])


@pytest.mark.parametrize("seed", range(3))
def test_another_program_reads_the_notes_that_are_written(seed):
  notes = random_piece(seed)
  score = symusic.Score.from_midi(music.to_midi(notes)).to("second")
  heard = [Note(n.pitch, n.velocity, n.time, n.time + n.duration) for track in score.tracks for n in track.notes]
  assert_same_piece(heard, notes, within_seconds=0.001, within_velocity=0)


@pytest.mark.parametrize("seed", range(3))
def test_notes_that_another_program_writes_are_read(seed):
  score = symusic.Score(480)
  score.tempos.append(symusic.Tempo(0, 97.3))
  score.tracks = [symusic.Track() for _ in range(3)]
  random = np.random.default_rng(seed)
  for track in score.tracks:
    for start, duration in zip(random.integers(0, 9000, 100).tolist(), random.integers(1, 900, 100).tolist()):
      track.notes.append(symusic.Note(start, duration, int(random.integers(128)), int(random.integers(1, 128))))
  seconds = 60 / 97.3 / 480
  written = [
    Note(n.pitch, n.velocity, n.time * seconds, (n.time + n.duration) * seconds) for t in score.tracks for n in t.notes
  ]
  heard = music.read_notes(score.dumps_midi())
  assert sorted(n.pitch for n in heard) == sorted(n.pitch for n in written)
  np.testing.assert_allclose(sorted(n.onset for n in heard), sorted(n.onset for n in written), atol=1e-4)
  np.testing.assert_allclose(sorted(n.offset for n in heard), sorted(n.offset for n in written), atol=1e-4)


def test_read_notes_honours_tempo_across_tracks():
  """100 ticks per beat: 0.5 s per beat at first, 1 s from tick 100 on, which falls into the note."""
  midi = midi_file([tempo(100, 1_000_000)], [strike(50, C4), release(200, C4)], ticks_per_beat=100)
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


FOUR = [event for tick in range(4) for event in (strike(tick * 500, C4 + tick), release(tick * 500 + 500, C4 + tick))]
FOUR_NOTES = [Note(C4 + place, 80, place / 2, place / 2 + 0.5) for place in range(4)]


@pytest.mark.parametrize(
  "event",
  [
    *(meta(0, 0x59, content) for content in (b"\xee\1", b"\x40\0", b"\0\xff", b"", b"\0" * 9)),  # key signatures
    *(meta(0, 0x58, content) for content in (b"\0\xff\0\0", b"\4", b"")),  # time signatures
    *(meta(0, 0x51, content) for content in (b"\0\0\0", b"", b"\7\xa1", b"\7\xa1\x20\0")),  # tempos
    *(meta(0, 0x54, content) for content in (b"", b"\xff" * 5)),  # SMPTE offsets
    *(meta(0, kind, b"\xff\xfe\0") for kind in (0, 1, 3, 5, 0x20, 0x21, 0x60, 0x7F)),
    *(meta(0, 0x2E, b"\0" * 300), meta(0, 1, "Kl\xe4vier".encode("latin-1"))),
    *((0, bytes([0xB0, controller, 255])) for controller in (1, 7, 200)),
    *((0, event) for event in (b"\xa0\xff\xff", b"\xc0\x05", b"\xd0\xff", b"\xe0\xff\xff", b"\xf8", b"\xf2\0\0")),
    *((0, event) for event in (b"\xf0\3\x43\x12\xf7", b"\xf0\0", b"\xf7\2\xf3\1")),
  ],
  ids=lambda event: event[1][:8].hex(),
)
def test_read_notes_ignores_what_does_not_decide_on_notes(event):
  assert music.read_notes(midi_file([event, *FOUR])) == FOUR_NOTES
  assert music.read_notes(midi_file([*FOUR[:3], (750, event[1]), *FOUR[3:]])) == FOUR_NOTES


@pytest.mark.parametrize("event", [b"\xf0\3\x43\x12\xf7", b"\xf7\0", b"\xff\1\2hi", b"\xf8"])
def test_read_notes_running_status_survives(event):
  """The note-off has no status: that of the note-on is still in force."""
  midi = midi_file([strike(0, C4), (0, event), (500, bytes([C4, 0])), strike(600, E4), (700, bytes([E4, 0]))])
  assert music.read_notes(midi) == [Note(C4, 80, 0.0, 0.5), Note(E4, 80, 0.6, 0.7)]


def test_read_notes_running_status_of_one_data_byte():
  """A program change, two more by running status with a text between them, and notes by a status of their own."""
  track = [(0, b"\xc0\5"), (0, b"\6"), meta(0, 1, b"hi"), (10, b"\7"), strike(10, C4), (20, bytes([C4, 0]))]
  assert music.read_notes(midi_file(track)) == [Note(C4, 80, 0.01, 0.02)]


@pytest.mark.parametrize("controller", [120, 123, 124, 125, 126, 127])
def test_read_notes_all_notes_off(controller):
  """It ends the notes that are held and those that the pedal keeps, on its channel; the pedal stays down."""
  track = [pedal(0, 127), strike(0, C4), strike(0, E4), strike(0, G4, channel=1), release(100, E4)]
  track += [control(500, controller), release(600, C4), strike(700, C4), release(800, C4)]
  track += [release(10_000, G4, channel=1), end_of_track(10_500)]
  expected = [Note(C4, 80, 0.0, 0.5), Note(E4, 80, 0.0, 0.5), Note(G4, 80, 0.0, 10.0), Note(C4, 80, 0.7, 10.5)]
  assert music.read_notes(midi_file(track)) == expected


def test_read_notes_reset_all_controllers():
  """It lifts the pedal, and nothing else."""
  track = [pedal(0, 127), strike(0, C4), strike(0, E4), release(100, E4), control(500, 121), release(700, C4)]
  assert music.read_notes(midi_file([*track, end_of_track(9000)])) == [Note(C4, 80, 0.0, 0.7), Note(E4, 80, 0.0, 0.5)]


def test_read_notes_pedal_applies_to_all_tracks_of_its_channel():
  left_hand = [strike(0, C4), release(100, C4)]
  assert music.read_notes(midi_file(left_hand, [pedal(0, 127), pedal(500, 0)])) == [Note(C4, 80, 0.0, 0.5)]


def test_read_notes_order_within_a_tick_counts():
  """The pedal prolongs a note released after it came down, not one released before, at the same tick."""
  for track, offset in (([pedal(100, 127), release(100, C4)], 0.5), ([release(100, C4), pedal(100, 127)], 0.1)):
    assert music.read_notes(midi_file([strike(0, C4), *track, pedal(500, 0)])) == [Note(C4, 80, 0.0, offset)]


def riff(*chunks):
  content = b"RMID" + b"".join(
    name + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2) for name, data in chunks
  )
  return b"RIFF" + len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize(
  "midi",
  [
    riff((b"data", midi_file(FOUR))),
    riff((b"LIST", b"odd"), (b"data", midi_file(FOUR)), (b"more", b"")),
    header(3) + track_chunk([]) + track_chunk(FOUR),
    header(1) + track_chunk([]) + track_chunk(FOUR),
    header(0) + track_chunk(FOUR),
    header(1, file_type=0) + track_chunk(FOUR[:4]) + track_chunk(FOUR[4:]),
    header(2) + track_chunk([tempo(0, 500_000)]) + chunk(b"XFIH", b"hello") + track_chunk(FOUR),
    header(2) + chunk(b"XFIH", b"") + track_chunk([]) + track_chunk(FOUR) + chunk(b"XFKM", b"hello"),
    chunk(b"MThd", header(1)[8:] + b"more") + track_chunk(FOUR),
    midi_file(FOUR) + b"trailing garbage",
    midi_file(FOUR) + b"\0",
    header(1) + chunk(b"MTrk", track_chunk(FOUR)[8:-4]),
    header(1) + chunk(b"MTrk", track_chunk(FOUR)[8:] + b"after the end of the track"),
  ],
  ids=[
    *("RIFF", "RIFF with other chunks", "two of three tracks", "two tracks, one announced", "no track announced"),
    *("two tracks of type 0", "a chunk between tracks", "chunks around tracks", "a longer header", "trailing garbage"),
    *("a trailing byte", "no end of track", "data after the end of track"),
  ],
)
def test_read_notes_of_unusual_files(midi):
  assert music.read_notes(midi) == FOUR_NOTES


PIECE = midi_file([strike(0, C4), pedal(50, 127), release(100, C4), strike(200, G4), release(300, G4)], file_type=0)


@pytest.mark.parametrize(
  "midi,reason",
  [
    (b"", "it is empty"),
    (PIECE[:10], "it is truncated"),
    (PIECE[:-20], "it is truncated: a chunk announces 24 bytes, and 4 follow"),
    (header(2) + track_chunk(FOUR) + b"MTr", "it is truncated"),
    (header(1), "it has no tracks"),
    (riff((b"LIST", b"")), "its RIFF container has no data chunk"),
    (b"A photograph of a piano.", "does not begin with MThd"),
    (midi_file([strike(0, C4)], [strike(0, C4)], file_type=2), "type 2 are not supported"),
    (midi_file([], ticks_per_beat=0xE728), "time division 0xe728 is not supported"),
    (midi_file([], ticks_per_beat=0), "time division 0x0000"),
    (midi_file([strike(0, C4), release(24 * 3600 * 1000 + 1, C4)]), "24 hours"),
    (midi_file([tempo(0, 1), strike(0, C4), tempo(9, 2**24 - 1), end_of_track(2**28)]), "24 hours"),
    (midi_file([strike(0, C4), end_of_track(2**40)]), "more than 4 bytes"),
    (midi_file([strike(0, 253)]), "data byte 253, which is above 127"),
    (midi_file([strike(0, C4, 200)]), "data byte 200"),
    (midi_file([pedal(0, 128)]), "data byte 128"),
    (midi_file([(0, b"\x40\x40")]), "an event has no status"),
    (midi_file([], [(0, b"\xf4")]), "in track 2, the status byte 0xf4 is not defined"),
    (header(1) + chunk(b"MTrk", b"\0\x90\x40"), "track 1 ends in the middle of an event"),
    (header(1) + chunk(b"MTrk", b"\0\xff\1\x7fhi"), "track 1 ends in the middle of an event"),
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
