# SPDX-License-Identifier: Apache-2.0
"""Every system of the papers from export to its answer, whole and split, as commands, on files of its own kind."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from perceiver_export.exporter import export
from perceiver_export.exporter.cli import run, run_pictures
from perceiver_export.runtimes import load, open_bundle
from perceiver_export.runtimes.tasks import TASKS

from . import small_models
from .commands import fail, succeed
from .torch_answers import found_numbers, torch_numbers

RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, or directory, of every kind."""
    folder = tmp_path_factory.mktemp("inputs")
    for directory, size, count in (("frames", (20, 30), 3), ("video", (24, 20), 2)):
        (folder / directory).mkdir()
        for index in range(count):
            Image.fromarray(_smooth(size, index)).save(folder / directory / f"frame{index}.png")
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes((8000 * np.sin(np.arange(4800) / 20)).astype("<i2").tobytes())
    (folder / "text.txt").write_text("good [MASK*4] to you")
    np.savetxt(folder / "cloud.xyz", RNG.normal(size=(15, 3)))
    np.savez(folder / "units.npz", entities=RNG.normal(size=(9, 16)).astype(np.float32))
    return folder


def _smooth(size: tuple[int, int], shift: int) -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [np.sin((x + shift) / 5), np.cos(y / 4), np.sin((x + y + shift) / 7)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


# System, what to give `run`, what its answer must hold.
RUNS: list[tuple[str, list[str], list[str]]] = [
    ("language", ["text.txt"], ["good ", "position"]),
    ("sentiment", ["This is fine"], ["bad", "good"]),
    ("glue", ["Is it so?"], ["cola", "mnli"]),
    ("pictures", ["frames"], ["cat", "dog", "bird", "frame2.png"]),
    ("flow", ["frames/frame0.png", "frames/frame1.png"], ["frame0.png", "mean"]),
    ("video", ["video", "sound.wav"], ["PSNR"]),
    ("sound", ["sound.wav", "video"], ["hum", "hiss", "bang"]),
    ("first_sound", ["sound.wav", "video"], ["hum", "hiss", "bang"]),
    ("mel", ["sound.wav"], ["hum", "hiss", "bang"]),
    ("points", ["cloud.xyz"], ["chair", "cloud.xyz"]),
    ("sets", ["units.npz"], ["outputs", "9 × 8"]),
]
WITHOUT_LABELS = ("glue", "flow", "sets")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    folder, made = tmp_path_factory.mktemp("every-task"), {}
    for system, _, _ in RUNS:
        for split in (False, True):
            path = folder / f"{system}-{'split' if split else 'whole'}"
            made[system, split] = export(getattr(small_models, system)(), path, split=split).path
    return made


def test_pictures_of_a_directory_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("frame10.png", "frame2.png", "notes.txt"):
        (tmp_path / name).touch()

    assert [file.name for file in run_pictures._files([str(tmp_path), "one.png"])] == [
        "frame2.png", "frame10.png", "one.png",
    ]  # fmt: skip


def test_every_task_has_a_command_and_says_what_it_takes() -> None:
    assert TASKS.keys() == run._COMMANDS.keys() == run.INPUTS.keys()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(("system", "inputs", "expected"), RUNS, ids=[run[0] for run in RUNS])
def test_run_answers(
    bundles: dict[tuple[str, bool], Path], files: Path, system: str, split: bool, inputs: list[str], expected: list[str]
) -> None:
    given = [str(files / text) if (files / text).exists() else text for text in inputs]
    shown = succeed("run", bundles[system, split], *given)
    every = [] if system in WITHOUT_LABELS else ["--top", "999"]
    document = json.loads(succeed("run", bundles[system, split], *given, "--json", *every))

    assert all(text in shown for text in expected), shown
    assert document["runtime"]["target"] == "ort-cpu"
    numbers = found_numbers(system, document)
    reference = torch_numbers(system, getattr(small_models, system)(), bundles[system, False], given)
    assert numbers.keys() == reference.keys()
    for name, values in reference.items():
        np.testing.assert_allclose(numbers[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("system", [run[0] for run in RUNS])
def test_split_and_whole_are_one_model(bundles: dict[tuple[str, bool], Path], system: str) -> None:
    whole, split = (open_bundle(bundles[system, kind]) for kind in (False, True))
    with np.load(whole.path / "golden.npz") as golden:
        feeds = {key.removeprefix("input/"): golden[key] for key in golden if key.startswith("input/")}
        expected = {key.removeprefix("output/"): golden[key] for key in golden if key.startswith("output/")}
    with load(split) as runtime:
        found = runtime.run(feeds)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if system == "language":  # DeepMind masks queries of padding; a split decoder is not told what padding is
            there = feeds["tokens_mask"][0].astype(bool)
            found[name], array = found[name][:, there], array[:, there]
        if system == "sets":
            there = feeds["entities_mask"][0].astype(bool)
            found[name], array = found[name][:, there], array[:, there]
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max())


def test_flow_is_written_as_files_and_as_a_picture(
    bundles: dict[tuple[str, bool], Path], files: Path, tmp_path: Path
) -> None:
    pair = (files / "frames" / "frame0.png", files / "frames" / "frame1.png")
    for name in ("flow.flo", "flow.npy", "flow.png"):
        succeed("run", bundles["flow", False], *pair, "-o", tmp_path / name)
    assert np.load(tmp_path / "flow.npy").shape == (20, 30, 2)
    with Image.open(tmp_path / "flow.png") as picture:
        assert picture.size == (30, 20)
    assert (tmp_path / "flow.flo").read_bytes()[:4] == b"PIEH"
    succeed("run", bundles["flow", True], files / "frames", "-o", tmp_path / "all")
    assert len(list((tmp_path / "all").glob("*.flo"))) == 2


def test_video_is_written_as_frames_and_sound(
    bundles: dict[tuple[str, bool], Path], files: Path, tmp_path: Path
) -> None:
    succeed("run", bundles["video", True], files / "video", files / "sound.wav", "-o", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    with wave.open(str(tmp_path / "out" / "sound.wav"), "rb") as file:
        assert (file.getnframes(), file.getframerate()) == (480, 48_000)


def bad_inputs(folder: Path) -> dict[str, tuple[str, list[Any], str]]:
    """What is wrong with it: the system, what it is given, and words of the error."""
    (folder / "small").mkdir()
    (folder / "mixed").mkdir()
    Image.fromarray(_smooth((10, 30), 0)).save(folder / "small" / "frame0.png")
    Image.fromarray(_smooth((10, 30), 1)).save(folder / "small" / "frame1.png")
    Image.fromarray(_smooth((20, 30), 0)).save(folder / "mixed" / "frame0.png")
    Image.fromarray(_smooth((20, 31), 0)).save(folder / "mixed" / "frame1.png")
    (folder / "latin.txt").write_bytes(b"caf\xe9 [MASK]")
    with wave.open(str(folder / "slow.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes(bytes(2 * 9600))
    np.save(folder / "nan.npy", np.array([[0, 0, np.nan], [1, 2, 3]]))
    np.save(folder / "nothing.npy", np.zeros((0, 3)))
    np.savez(folder / "empty.npz", entities=np.zeros((0, 16), np.float32))
    np.savez(folder / "masked.npz", entities=np.ones((4, 16), np.float32), entities_mask=np.zeros(4, np.int32))
    return {
        "text longer than the model": ("language", ["x" * 33 + "[MASK]"], "the text has 34 bytes, 32 fit"),
        "no mask to fill": ("language", ["nothing to do"], "the text has no [MASK]"),
        "text that is not UTF-8": (
            "language",
            [folder / "latin.txt"],
            "latin.txt: the text is not valid UTF-8: byte 0xe9 at offset 3",
        ),
        "frames smaller than a tile": ("flow", [folder / "small"], "10 × 30"),
        "frames of different sizes": ("flow", [folder / "mixed"], "frame0.png has 20 × 30 pixels"),
        "sound of another rate": (
            "mel",
            [folder / "slow.wav"],
            "slow.wav has 44100 samples a second, the model takes 48000",
        ),
        "points that are no numbers": ("points", [folder / "nan.npy"], "nan.npy: point 0 is [0.0, 0.0, nan]"),
        "no points": ("points", [folder / "nothing.npy"], "nothing.npy holds no point"),
        "an empty set": ("sets", [folder / "empty.npz"], "the entities have shape [1, 0, 16]"),
        "a mask that masks everything": (
            "sets",
            [folder / "masked.npz"],
            "'entities_mask' masks everything of sample 0",
        ),
    }


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_bad_input_is_one_error_and_one_hint(
    bundles: dict[tuple[str, bool], Path], split: bool, tmp_path: Path
) -> None:
    for what, (system, given, expected) in bad_inputs(tmp_path).items():
        assert expected in fail("run", bundles[system, split], *given).splitlines()[0], what


@pytest.mark.parametrize("system", WITHOUT_LABELS)
def test_labels_are_not_counted_where_there_are_none(bundles: dict[tuple[str, bool], Path], system: str) -> None:
    assert "no labels" in fail("run", bundles[system, False], "anything", "--top", "2")


def test_own_models_of_the_examples(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    succeed("export", "your_own:robot", "-o", tmp_path / "robot", cwd=examples)
    arrays: dict[str, Any] = {
        "sound": RNG.normal(size=(160, 1)),
        "touch": RNG.normal(size=(6, 8, 2)),
        "joints": RNG.normal(size=(7, 3)),
        "joints_mask": np.array([1] * 5 + [0] * 2),
    }
    np.savez(tmp_path / "arrays.npz", **arrays)
    succeed("run", tmp_path / "robot", tmp_path / "arrays.npz", "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as out:
        assert {name: out[name].shape for name in out} == {"objects": (5, 10), "motion": (20, 7)}
    for spec, expected in (
        ("your_own:nothing", "cannot be imported"),
        ("nowhere:robot", "cannot be imported"),
        ("math:pi", "is of type float"),
        ("os:getcwd", "gave a str"),
    ):
        assert expected in fail("export", spec, "-o", tmp_path / "no", cwd=examples)
    assert not (tmp_path / "no").exists()
