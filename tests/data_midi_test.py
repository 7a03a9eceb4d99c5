"""MIDI files: notes survive writing and reading, unusual files are read, broken ones are refused with the reason."""

import numpy as np
import pytest
import symusic

from perceiver_ar_jax.data import midi
from perceiver_ar_jax.data.music import Note
from tests.notes import C4, E4, G4, assert_same_piece, random_piece, read_notes


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


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_through_midi(seed):
  notes = random_piece(seed)
  assert_same_piece(read_notes(midi.write(notes)), notes, within_seconds=0.000501, within_velocity=0)


def test_midi_of_whole_milliseconds_is_exact():
  notes = [Note(C4, 80, 0.5, 0.75), Note(G4, 1, 0.5, 1.001), Note(C4, 127, 0.75, 0.751)]
  assert read_notes(midi.write(notes)) == notes


def test_midi_note_lasts_a_millisecond():
  assert read_notes(midi.write([Note(C4, 80, 0.5, 0.5)])) == [Note(C4, 80, 0.5, 0.501)]


def test_midi_ends_a_note_before_it_is_struck_again():
  """A player that receives the note-off second would silence the new note."""
  events = b"".join([bytes([0x90, C4, 80, 100, 0x80, C4, 0]), bytes([0, 0x90, C4, 80, 100, 0x80, C4, 0])])
  assert events in midi.write([Note(C4, 80, 0, 0.1), Note(C4, 80, 0.1, 0.2)])


@pytest.mark.parametrize("seed", range(3))
def test_another_program_reads_the_notes_that_are_written(seed):
  notes = random_piece(seed)
  score = symusic.Score.from_midi(midi.write(notes)).to("second")
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
  heard = read_notes(score.dumps_midi())
  assert sorted(n.pitch for n in heard) == sorted(n.pitch for n in written)
  np.testing.assert_allclose(sorted(n.onset for n in heard), sorted(n.onset for n in written), atol=1e-4)
  np.testing.assert_allclose(sorted(n.offset for n in heard), sorted(n.offset for n in written), atol=1e-4)


def test_read_notes_honours_tempo_across_tracks():
  """100 ticks per beat: 0.5 s per beat at first, 1 s from tick 100 on, which falls into the note."""
  midi = midi_file([tempo(100, 1_000_000)], [strike(50, C4), release(200, C4)], ticks_per_beat=100)
  assert read_notes(midi) == [Note(C4, 80, 0.25, 1.5)]


def test_read_notes_velocity_0_releases():
  assert read_notes(midi_file([strike(0, C4), strike(100, C4, velocity=0)])) == [Note(C4, 80, 0.0, 0.1)]


def test_read_notes_merges_tracks_in_order():
  midi = midi_file([strike(100, G4), release(200, G4)], [strike(0, E4), strike(100, C4), release(200, E4)])
  assert read_notes(midi) == [Note(E4, 80, 0.0, 0.2), Note(C4, 80, 0.1, 0.2), Note(G4, 80, 0.1, 0.2)]


def test_read_notes_pedal():
  """G4 is let go under the pedal and sounds until it is up; C4 is still held then; E4 came after."""
  track = [pedal(0, 64), strike(100, C4), strike(100, G4), release(200, G4), pedal(300, 63)]
  track += [release(400, C4), strike(500, E4), release(600, E4)]
  expected = [Note(C4, 80, 0.1, 0.4), Note(G4, 80, 0.1, 0.3), Note(E4, 80, 0.5, 0.6)]
  assert read_notes(midi_file(track)) == expected


def test_read_notes_pedal_holds_until_struck_again():
  track = [pedal(0, 127), strike(0, C4, 70), release(100, C4), strike(200, C4, 90), release(250, C4), pedal(500, 0)]
  assert read_notes(midi_file(track)) == [Note(C4, 70, 0.0, 0.2), Note(C4, 90, 0.2, 0.5)]


def test_read_notes_pedal_applies_to_its_channel_only():
  track = [pedal(0, 127, channel=1), strike(0, C4), strike(0, G4, channel=1), release(100, C4)]
  track += [release(100, G4, channel=1), strike(200, G4), release(300, G4), pedal(400, 0), end_of_track(900)]
  expected = [Note(C4, 80, 0.0, 0.1), Note(G4, 80, 0.0, 0.9), Note(G4, 80, 0.2, 0.3)]
  assert read_notes(midi_file(track)) == expected


def test_read_notes_overlap_ends_the_earlier_note():
  track = [strike(0, C4, 70), strike(100, C4, 90), release(200, C4), release(300, C4), release(400, C4)]
  assert read_notes(midi_file(track)) == [Note(C4, 70, 0.0, 0.2), Note(C4, 90, 0.1, 0.3)]


def test_read_notes_unreleased_end_with_the_file():
  track = [strike(0, C4), strike(100, G4), end_of_track(700)]
  assert read_notes(midi_file(track)) == [Note(C4, 80, 0.0, 0.7), Note(G4, 80, 0.1, 0.7)]


def test_read_notes_leaves_percussion_out():
  drums = [strike(0, 36, channel=9), release(100, 36, channel=9)]
  assert read_notes(midi_file(drums)) == []
  assert read_notes(midi_file(drums, [strike(0, C4), release(100, C4)])) == [Note(C4, 80, 0.0, 0.1)]


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
def test_read_notes_ignores_other_events(event):
  assert read_notes(midi_file([event, *FOUR])) == FOUR_NOTES
  assert read_notes(midi_file([*FOUR[:3], (750, event[1]), *FOUR[3:]])) == FOUR_NOTES


@pytest.mark.parametrize("event", [b"\xf0\3\x43\x12\xf7", b"\xf7\0", b"\xff\1\2hi", b"\xf8"])
def test_read_notes_running_status_survives(event):
  """The note-off has no status: that of the note-on is still in force."""
  midi = midi_file([strike(0, C4), (0, event), (500, bytes([C4, 0])), strike(600, E4), (700, bytes([E4, 0]))])
  assert read_notes(midi) == [Note(C4, 80, 0.0, 0.5), Note(E4, 80, 0.6, 0.7)]


def test_read_notes_running_status_of_one_data_byte():
  """A program change, two more by running status with a text between them, and notes by a status of their own."""
  track = [(0, b"\xc0\5"), (0, b"\6"), meta(0, 1, b"hi"), (10, b"\7"), strike(10, C4), (20, bytes([C4, 0]))]
  assert read_notes(midi_file(track)) == [Note(C4, 80, 0.01, 0.02)]


def test_read_notes_of_long_waits_between_messages():
  """Times of 1 to 4 bytes, with a status and without, next to one another in a track."""
  track, expected = [], []
  for start, wait in enumerate((1, 127, 128, 2**14 - 1, 2**14, 2**21 - 1, 2**21)):
    begin = track[-1][0] + start if track else 0
    track += [strike(begin, C4), (begin + wait, bytes([C4, 0]))]
    expected.append(Note(C4, 80, begin / 1000, (begin + wait) / 1000))
  assert read_notes(midi_file(track)) == expected


def test_read_notes_running_status_of_events_that_are_not_read():
  """Pitch bends, the second with a byte above 127: their data may be anything, that of a note may not."""
  bends = [strike(0, C4), (10, b"\xe0\1\2"), (20, b"\3\4"), (30, b"\5\xff")]
  assert read_notes(midi_file([*bends, release(500, C4)])) == [Note(C4, 80, 0.0, 0.5)]
  with pytest.raises(ValueError, match="data byte 255"):
    read_notes(midi_file([strike(0, C4), (10, bytes([E4, 70])), (20, bytes([E4, 255])), release(500, C4)]))


@pytest.mark.parametrize("controller", [120, 123, 124, 125, 126, 127])
def test_read_notes_all_notes_off(controller):
  """It ends the notes that are held and those that the pedal keeps, on its channel; the pedal stays down."""
  track = [pedal(0, 127), strike(0, C4), strike(0, E4), strike(0, G4, channel=1), release(100, E4)]
  track += [control(500, controller), release(600, C4), strike(700, C4), release(800, C4)]
  track += [release(10_000, G4, channel=1), end_of_track(10_500)]
  expected = [Note(C4, 80, 0.0, 0.5), Note(E4, 80, 0.0, 0.5), Note(G4, 80, 0.0, 10.0), Note(C4, 80, 0.7, 10.5)]
  assert read_notes(midi_file(track)) == expected


def test_read_notes_reset_all_controllers():
  """It lifts the pedal, and nothing else."""
  track = [pedal(0, 127), strike(0, C4), strike(0, E4), release(100, E4), control(500, 121), release(700, C4)]
  assert read_notes(midi_file([*track, end_of_track(9000)])) == [Note(C4, 80, 0.0, 0.7), Note(E4, 80, 0.0, 0.5)]


def test_read_notes_pedal_applies_to_all_tracks_of_its_channel():
  left_hand = [strike(0, C4), release(100, C4)]
  assert read_notes(midi_file(left_hand, [pedal(0, 127), pedal(500, 0)])) == [Note(C4, 80, 0.0, 0.5)]


def test_read_notes_order_within_a_tick_counts():
  """The pedal prolongs a note released after it came down, not one released before, at the same tick."""
  for track, offset in (([pedal(100, 127), release(100, C4)], 0.5), ([release(100, C4), pedal(100, 127)], 0.1)):
    assert read_notes(midi_file([strike(0, C4), *track, pedal(500, 0)])) == [Note(C4, 80, 0.0, offset)]


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
  assert read_notes(midi) == FOUR_NOTES


PIECE = midi_file([strike(0, C4), pedal(50, 127), release(100, C4), strike(200, G4), release(300, G4)], file_type=0)


@pytest.mark.parametrize(
  "midi,reason",
  [
    (b"", "it does not contain the header of a MIDI file"),
    (PIECE[:10], "it does not contain the header of a MIDI file"),
    (PIECE[:-20], "it is truncated: a chunk announces 24 bytes, and 4 follow"),
    (header(2) + track_chunk(FOUR) + b"MTr", "it is truncated"),
    (header(1), "it has no tracks"),
    (riff((b"LIST", b"")), "it does not contain the header"),
    (b"A photograph of a piano.", "it does not contain the header"),
    (midi_file([strike(0, C4)], [strike(0, C4)], file_type=2), "type 2 with time division 0x01f4 is not supported"),
    (midi_file([], ticks_per_beat=0xE728), "type 1 with time division 0xe728 is not supported"),
    (midi_file([], ticks_per_beat=0), "time division 0x0000"),
    (midi_file([strike(0, C4), release(24 * 3600 * 1000 + 1, C4)]), "24 hours"),
    (midi_file([tempo(0, 1), strike(0, C4), tempo(9, 2**24 - 1), end_of_track(2**28)]), "24 hours"),
    (midi_file([strike(0, C4), end_of_track(2**40)]), "more than 4 bytes"),
    (midi_file([strike(0, 253)]), "data byte 253, which is above 127"),
    (midi_file([strike(0, C4, 200)]), "data byte 200"),
    (midi_file([pedal(0, 128)]), "data byte 128"),
    (midi_file([(0, b"\x40\x40")]), "an event has no status"),
    (midi_file([], [(0, b"\xf4")]), "track 2 is damaged or truncated: the status byte 0xf4 is not defined"),
    (header(1) + chunk(b"MTrk", b"\0\x90\x40"), "track 1 is damaged or truncated"),
    (header(1) + chunk(b"MTrk", b"\0\xff\1\x7fhi"), "track 1 is damaged or truncated"),
  ],
)
def test_read_notes_names_the_damage(midi, reason):
  with pytest.raises(ValueError, match=reason):
    read_notes(midi)


@pytest.mark.parametrize("length", range(len(PIECE)))
def test_read_notes_truncated(length):
  with pytest.raises(ValueError):
    read_notes(PIECE[:length])


@pytest.mark.parametrize("position", range(len(PIECE)))
def test_read_notes_damaged(position):
  """Whatever byte is wrong: the file is read, or is a ValueError."""
  for byte in [0, 1, 0x59, 0x7F, 0x80, 0xC0, 0xF0, 0xFF]:
    try:
      notes = read_notes(PIECE[:position] + bytes([byte]) + PIECE[position + 1 :])
    except ValueError:
      continue
    assert all(0 <= n.pitch < 128 and 1 <= n.velocity <= 127 and n.offset >= n.onset >= 0 for n in notes)
