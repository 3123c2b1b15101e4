# SPDX-License-Identifier: Apache-2.0
"""`run` on frames: what it writes, and what it refuses before the model runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from perceiver_export.exporter.cli import run_frames
from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.tasks.flow import OpticalFlow
from perceiver_export.runtimes.tasks.flow_files import flow_image
from perceiver_export.runtimes.tasks.image_files import read_image
from tests.runtimes.conftest import Ask
from tests.runtimes.flow_models import manifest, open_fake, picture

Run = Callable[..., Any]


@pytest.fixture
def run(ask: Ask) -> Run:
    """`run` on a model with tiles of 16 × 24."""
    return partial(ask, open_fake(manifest((16, 24)))[0])


@pytest.fixture
def frames(tmp_path: Path) -> list[str]:
    """Three frames in a directory of their own."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"frame{number}.png" for number in (1, 2, 10)]
    for seed, path in enumerate(paths):
        Image.fromarray(picture(20, 30, seed)).save(path)
    return list(map(str, paths))


def expected_flow(first: str, second: str) -> npt.NDArray[np.float32]:
    return open_fake(manifest((16, 24)))[0](first, second)


def flow_of(path: Path) -> npt.NDArray[np.float32]:
    content = path.read_bytes()
    width, height = np.frombuffer(content, "<i4", 2, offset=4)
    return np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2)


@pytest.mark.parametrize("ending", [".flo", ".npy", ".png"])
def test_run_writes_one_flow(run: Run, frames: list[str], tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"flow{ending}"
    shown = run(*frames[:2], output=output)

    flow = expected_flow(*frames[:2])
    if ending == ".png":
        np.testing.assert_array_equal(read_image(output), flow_image(flow))
    else:
        np.testing.assert_array_equal(flow_of(output) if ending == ".flo" else np.load(output), flow)
    assert "frame1.png" in shown
    assert f"{np.hypot(*flow.transpose(2, 0, 1)).max():.2f}" in shown
    assert f"flow{ending}" in shown.replace("\n", "")


def test_run_writes_a_directory_of_flows(run: Run, frames: list[str], tmp_path: Path) -> None:
    shown = run(tmp_path / "in", output=tmp_path / "out", as_json=True)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "frame1.flo", "frame1.png", "frame2.flo", "frame2.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(flow_of(tmp_path / "out" / "frame2.flo"), expected_flow(frames[1], frames[2]))
    assert [pair["frames"] for pair in shown["pairs"]] == [frames[:2], frames[1:]]
    flow = expected_flow(frames[0], frames[1])
    lengths = np.hypot(flow[..., 0], flow[..., 1])
    first = shown["pairs"][0]
    assert (first["height"], first["width"]) == (20, 30)
    assert first["mean"] == pytest.approx(lengths.mean(), rel=1e-5)
    assert first["max"] == pytest.approx(lengths.max(), rel=1e-5)
    assert first["files"] == [str(tmp_path / "out" / name) for name in ("frame1.flo", "frame1.png")]


def test_run_without_output_says_how_to_write(run: Run, frames: list[str], tmp_path: Path) -> None:
    shown = run(*frames)

    assert ".flo" in shown
    assert shown.count("frame2.png") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_frames_of_one_name_are_told_apart_and_do_not_overwrite_each_other(
    run: Run, frames: list[str], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "frame1.png"
    Image.open(frames[1]).save(same)

    run(frames[0], same, frames[2], output=tmp_path / "out", as_json=True)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.flo"))
    assert names == ["00000_frame1.flo", "00001_frame1.flo"]
    assert set(re.findall(r"\S+/frame1\.png", run(frames[0], same))) == {"in/frame1.png", "other/frame1.png"}

    Image.fromarray(picture(20, 31)).save(same)
    with pytest.raises(InputError, match=f"{frames[0]} has 20 × 30 pixels, {same} has 20 × 31"):
        run(frames[0], same)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError])
def test_a_directory_is_whole_or_not_there(
    run: Run, frames: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, stop: type[BaseException]
) -> None:
    """The second flow never comes: the third frame is of another size, or somebody has had enough."""
    seen = []

    def summarize(flow: Any) -> Any:
        seen.append(list(tmp_path.glob(".*/*.flo")))
        if stop is KeyboardInterrupt:
            raise KeyboardInterrupt
        return {"mean": 0, "max": 0, "direction": "still"}

    monkeypatch.setattr(run_frames, "summarize", summarize)
    Image.fromarray(picture(20, 31)).save(frames[2])
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(stop):
        run(*frames, output=tmp_path / "out")

    assert [len(files) for files in seen] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in", "out"] if there else ["in"])
    assert not there or not any((tmp_path / "out").iterdir())


def test_run_refuses_before_it_runs(
    run: Run, frames: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpticalFlow, "part", lambda *_: pytest.fail("a graph was loaded"))
    (tmp_path / "taken").touch()
    (tmp_path / "empty").mkdir()
    for inputs, output in [
        (frames[:1], None),
        ([str(tmp_path / "empty")], None),
        ([str(tmp_path / "in"), frames[0]], None),
        (frames[:2], tmp_path / "flow.jpg"),
        (frames[:2], tmp_path / "absent" / "flow.flo"),
        (frames, tmp_path / "flow.flo"),
        (frames, tmp_path / "taken"),
        (frames, tmp_path / "in"),
        (frames[:2], Path(frames[1])),
        (frames, tmp_path / "absent" / "out"),
    ]:
        with pytest.raises((InputError, UsageError)) as raised:
            run(*inputs, output=output)
        assert len(raised.value.hint) > 10


DIRECTIONS = {
    "right": (3, 0.2), "down and right": (3, 3), "down": (0, 3), "down and left": (-3, 3), "left": (-3, 0),
    "up and left": (-3, -3), "up": (0, -3), "up and right": (3, -3), "still": (0.01, 0), "not a number": (np.nan, 0),
}  # fmt: skip


def test_directions_in_words() -> None:
    flows = {name: np.broadcast_to(np.array(xy, np.float32), (4, 4, 2)) for name, xy in DIRECTIONS.items()}
    zoom = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4)), axis=-1).astype(np.float32)

    for name, flow in {**flows, "mixed": zoom}.items():
        assert run_frames.summarize(flow)["direction"] == name
