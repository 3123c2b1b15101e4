# SPDX-License-Identifier: Apache-2.0
"""WAV files of every encoding that is read, and what is refused; log-mel spectrograms."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.tasks.sound import FLOOR, as_sound, log_mel, mel_corners, read_wav, take_sound, write_wav

RATE = 48000
STEREO = np.array([[0.0, 0.9], [0.5, 0.9], [-0.5, 0.9], [-1.0, 0.9], [0.25, 0.9]])
LEFT = STEREO[:, 0].tolist()


def riff(content: bytes, bits: int, tag: int = 1, channels: int = 1, rate: int = RATE, extra: bytes = b"") -> bytes:
    """A WAV file around samples, with an odd chunk that readers must pass over."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * frame, frame, bits) + extra
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def pcm(samples: npt.NDArray[np.float64], bits: int) -> bytes:
    whole = np.round(samples * (1 << (bits - 1))).clip(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).astype(np.int64)
    if bits == 8:
        return (whole + 128).astype(np.uint8).tobytes()
    return b"".join(int(value).to_bytes(bits // 8, "little", signed=True) for value in whole.ravel())


EXTENSIBLE = struct.pack("<HHIH", 22, 24, 3, 1) + bytes.fromhex("000000001000800000aa00389b71")
ENCODINGS = {
    **{f"{bits} bits": riff(pcm(STEREO, bits), bits, channels=2) for bits in (8, 16, 24, 32)},
    **{f"float{8 * n}": riff(STEREO.astype(f"<f{n}").tobytes(), 8 * n, tag=3, channels=2) for n in (4, 8)},
    "extensible": riff(pcm(STEREO, 24), 24, tag=0xFFFE, channels=2, extra=EXTENSIBLE),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_the_first_channel(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(ENCODINGS[encoding])
    sound = read_wav(tmp_path / "a.wav", RATE)

    assert sound.dtype == np.float32
    assert sound.tolist() == LEFT


def test_what_the_standard_library_writes_is_read(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 999, dtype=np.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    (tmp_path / "a.wav").write_bytes(buffer.getvalue())

    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav", RATE), samples / np.float32(32768))
    assert len(read_wav(tmp_path / "a.wav", RATE, most=10)) == 10


@pytest.mark.parametrize("whole", [0, 36, 0x7FFFFFFF, 0x80000024, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 0x7FFFFFDB, 0x80000000, 0xFFFFFFFF])
def test_a_stream_of_unknown_length_is_read_to_its_end(tmp_path: Path, size: int, whole: int) -> None:
    """As recorders write it that cannot seek back: ffmpeg, arecord, SoX, GStreamer."""
    content = riff(pcm(STEREO[:, 0], 16), 16)
    at = content.index(b"data") + 4
    content = content[:4] + struct.pack("<I", whole) + content[8:at] + struct.pack("<I", size) + content[at + 4 :]
    (tmp_path / "a.wav").write_bytes(content)

    assert read_wav(tmp_path / "a.wav", RATE).tolist() == LEFT
    assert read_wav(tmp_path / "a.wav", RATE, most=2).tolist() == LEFT[:2]


def test_what_comes_behind_an_empty_recording_is_not_its_sound(tmp_path: Path) -> None:
    chunk = b"LIST" + struct.pack("<I", 4) + b"abcd"
    content = riff(b"", 16) + chunk
    (tmp_path / "a.wav").write_bytes(content[:4] + struct.pack("<I", len(content) - 8) + content[8:])

    with pytest.raises(InputError, match="no sound"):
        read_wav(tmp_path / "a.wav", RATE)


def test_writing_and_reading_gives_the_same_sixteen_bits_and_what_is_too_loud_is_clipped(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).integers(-32768, 32768, 500).astype(np.float32) / 32768
    for written, read in ((sound, sound), (np.array([1.5, -1.5], np.float32), [32767 / 32768, -1.0])):
        write_wav(tmp_path / "a.wav", written, RATE)
        np.testing.assert_array_equal(read_wav(tmp_path / "a.wav", RATE), np.array(read, np.float32))


def test_another_rate_is_refused_with_the_command_that_converts(tmp_path: Path) -> None:
    path = tmp_path / "my song.wav"
    path.write_bytes(riff(pcm(STEREO[:, 0], 16), 16, rate=44100))

    with pytest.raises(InputError, match="44100") as caught:
        read_wav(path, RATE)

    assert caught.value.hint == f"ffmpeg -i '{path}' -ar 48000 out.wav"


GOOD = riff(pcm(STEREO[:, 0], 16), 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"ID3\x04 this is not a WAV file", "not a WAV"),
        (b"RIFF\x00\x00", "not a WAV"),
        (GOOD[:-3], "7 of 10 bytes"),
        (GOOD[: GOOD.index(b"data")], "ends before its sound"),
        (GOOD[: GOOD.index(b"fmt ") + 14], "truncated in its header"),
        (riff(b"", 16), "no sound"),
        (riff(b"\x00" * 8, 8, tag=7), "format 7, 8 bits"),
        (riff(b"\x00" * 8, 16, channels=0), "encoding"),
        (riff(b"\x00" * 8, 12), "encoding"),
        (riff(np.array([0.0, np.nan], "<f4").tobytes(), 32, tag=3), "NaN or infinity"),
        (riff(np.array([0.0, 20000.0], "<f4").tobytes(), 32, tag=3), "up to 20000"),
        (GOOD[:12] + GOOD[GOOD.index(b"data") :], "before its format"),
    ],
)
def test_what_is_no_usable_recording_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_wav(tmp_path / "a.wav", RATE)


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_wav(tmp_path / "a.wav", RATE)
    with pytest.raises(InputError, match="cannot be read"):
        read_wav(tmp_path, RATE)


def test_every_cut_of_a_file_is_refused_and_none_crashes(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        (tmp_path / "a.wav").write_bytes(GOOD[:length])
        with pytest.raises(InputError):
            read_wav(tmp_path / "a.wav", RATE)


def test_arrays_are_taken_as_deepmind_takes_them() -> None:
    assert as_sound(np.array([[16384, 1], [-32768, 1]], np.int16)).tolist() == [0.5, -1.0]
    assert as_sound(STEREO).tolist() == LEFT
    assert as_sound(np.array([0.5], np.float64)).dtype == np.float32


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, np.int32),
        np.zeros((0,), np.float32),
        np.zeros((1, 2, 3), np.float32),
        np.array([np.inf], np.float32),
        np.array([300.0], np.float32),
    ],
)
def test_arrays_that_are_no_sound_are_refused(array: npt.NDArray[np.float32]) -> None:
    with pytest.raises(InputError):
        as_sound(array)


def test_sound_is_cut_to_length_and_too_short_is_refused_with_the_seconds_needed() -> None:
    assert take_sound(np.arange(10, dtype=np.float32) / 10, RATE, 3).tolist() == pytest.approx([0, 0.1, 0.2])
    with pytest.raises(InputError, match=r"0\.500 s") as caught:
        take_sound(np.zeros(24000, np.float32), RATE, 30720)
    assert "30720 samples, 0.640 s" in caught.value.message


def slow_log_mel(sound: npt.NDArray[np.float32], rate: int, frames: int, bins: int, size: int) -> list[list[float]]:
    """The definition, frequency by frequency: no FFT, no filter matrix."""
    width, corners = int(np.ceil(max(0.025 * rate, 2.5 * len(sound) / frames))), mel_corners(rate, bins)
    rows = []
    for frame in range(frames):
        begin = int((frame + 0.5) * len(sound) / frames) - width // 2
        piece = [float(sound[i]) if 0 <= i < len(sound) else 0.0 for i in range(begin, begin + width)]
        n = np.arange(width)
        piece_windowed = np.array(piece) * np.sin(np.pi * n / width) ** 2
        row = np.zeros(bins)
        for k in range(size // 2 + 1):
            power = abs(np.sum(piece_windowed * np.exp(-2j * np.pi * k * n / size))) ** 2
            for b in range(bins):
                row[b] += power * float(np.interp(k * rate / size, corners[b : b + 3], [0, 1, 0]))
        rows.append([float(np.log(max(energy, FLOOR))) for energy in row])
    return rows


def test_the_spectrogram_is_its_definition() -> None:
    sound = (np.random.default_rng(0).normal(size=400) * 0.1).astype(np.float32)

    # 100 samples a window; the narrowest of 6 bands is 168 Hz wide, so 128 points at 4 kHz resolve it.
    np.testing.assert_allclose(log_mel(sound, 4000, 10, 6), slow_log_mel(sound, 4000, 10, 6, 128), atol=1e-5)


@pytest.mark.parametrize(("frames", "bins"), [(1, 1), (37, 40), (480, 128), (100, 300)])
def test_any_number_of_frames_and_bins_comes_out_and_no_band_is_empty(frames: int, bins: int) -> None:
    sound = (np.random.default_rng(1).normal(size=30720) * 0.1).astype(np.float32)
    found = log_mel(sound, RATE, frames, bins)

    assert found.shape == (frames, bins)
    assert found.dtype == np.float32
    assert found.min() > np.log(FLOOR) + 1


def test_a_tone_is_where_the_mel_scale_puts_it() -> None:
    corners = mel_corners(RATE, 64)
    for band in (10, 40, 60):
        tone = np.sin(2 * np.pi * corners[band + 1] * np.arange(RATE) / RATE).astype(np.float32)
        assert set(log_mel(tone, RATE, 20, 64)[2:-2].argmax(axis=1).tolist()) == {band}


def test_the_mel_scale_is_htks() -> None:
    corners = mel_corners(16000, 30)
    assert 2595 * np.log10(1 + 1000 / 700) == pytest.approx(1000, abs=0.1)  # 1000 Hz is 1000 mel
    assert corners[0] == 0
    assert corners[-1] == pytest.approx(8000)
    assert np.allclose(np.diff(2595 * np.log10(1 + corners / 700)), 2840.023 / 31, atol=1e-3)


def test_silence_is_the_floor_and_half_the_amplitude_a_quarter_of_the_energy() -> None:
    sound = (np.random.default_rng(2).normal(size=4800) * 0.2).astype(np.float32)

    assert np.all(log_mel(np.zeros(4800, np.float32), RATE, 10, 20) == np.float32(np.log(FLOOR)))
    quieter = log_mel(sound, RATE, 10, 20) - log_mel(sound / np.float32(2), RATE, 10, 20)
    np.testing.assert_allclose(quieter, np.log(4), atol=1e-4)


def test_more_frames_than_samples_are_refused() -> None:
    with pytest.raises(InputError):
        log_mel(np.zeros(5, np.float32), RATE, 6, 4)
