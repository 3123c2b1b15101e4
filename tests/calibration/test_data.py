# SPDX-License-Identifier: Apache-2.0
"""DATA in every form that users have, read alike for `quantize` and `validate`, and in forms that must be refused."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from perceiver_export.calibration.data.samples import Example, Samples, stack
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.tasks import ImageClassification
from tests.calibration.manifests import TOKENS, flow, images, language, manifest, points, sets, spec, texts, video

Write = Callable[[Path], Any]  # writes DATA into a folder; None is the folder itself

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.integers(0, 256, (30, 40, 3), dtype=np.uint8)
PIXELS = GENERATOR.integers(0, 256, (3, 2, 16, 24, 3), dtype=np.uint8)
ENTITIES = GENERATOR.normal(size=(3, 12, 16)).astype(np.float32)
ONES = np.ones((3, 12), np.int32)
FIRST = np.array([[70] * 32, [71] * 32])
CAT, DOG, SHIRT = ("cat",), ("dog",), ("T-shirt/top",)

for_both = pytest.mark.parametrize("judged", [False, True], ids=["quantize", "validate"])


def read(data: Any, model: Manifest, judged: bool = False, samples: int | None = None) -> list[Example]:
    opened = Samples(data, model, samples, judged)
    found = list(opened.stream)
    assert opened.count in (None, len(found))
    return found


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGE).save(path)


def archive(folder: Path, /, name: str = "data.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def npz(**arrays: Any) -> Write:
    return lambda folder: archive(folder, **arrays)


def rows(*given: Any) -> Write:
    return lambda folder: list(given)


def text(content: str | bytes, name: str = "lines.jsonl") -> Write:
    """A file; None if it is of a folder of images."""

    def write(folder: Path) -> Path | None:
        if name == "labels.csv":
            saved("a.png", "sub/b.png")(folder)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return None if name in ("labels.csv", "a.png") else folder / name

    return write


def lines(*given: Any) -> Write:
    return text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given))


def table(content: str | bytes) -> Write:
    return text(content, "labels.csv")


def saved(*names: str) -> Write:
    def write(folder: Path) -> None:
        for name in names:
            save_image(folder / name)

    return write


def shards(folder: Path) -> None:
    for shard in range(8):
        archive(folder, f"{shard}.npz", image=np.zeros((1, 4, 4), np.uint8), labels=[shard // 4])


@for_both
def test_images_are_read_as_the_task_reads_them(
    judged: bool, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.fromarray(IMAGE).convert("CMYK").save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "own_images.py").write_text(
        "from PIL import Image\ndef samples():\n    yield {'image': Image.open('images/a.jpg')}\n"
    )
    monkeypatch.chdir(tmp_path)
    with open_task(fashion_bundle, ImageClassification) as task:
        expected = task.preprocess("images/a.jpg")
        for data in ("images", "own_images:samples", [{"image": Image.open("images/a.jpg")}]):
            (found,) = read(data, task.manifest, judged)
            np.testing.assert_array_equal(found.feeds["image"], expected)


@for_both
@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (
            saved("dog/b.png", "dog/a.PNG", "cat/c.jpg", "2/d.png", ".git/e.png"),
            {"2/d.png": SHIRT, "cat/c.jpg": CAT, "dog/a.PNG": DOG, "dog/b.png": DOG},
        ),
        (table("file,label\na.png,T-shirt/top\nsub/b.png,1\n"), {"a.png": SHIRT, "sub/b.png": DOG}),
        (table(b"\xef\xbb\xbffile,label\r\na.png,dog\r\n"), {"a.png": DOG}),  # as Excel writes it
        (saved("a.png"), {"a.png": ()}),
        (shards, {f"{shard}.npz[0]": (CAT, DOG)[shard // 4] for shard in range(8)}),
        (npz(image=np.stack([IMAGE] * 2)), {"data.npz[0]": (), "data.npz[1]": ()}),
        (npz(image=IMAGE[None], label=[1]), {"data.npz[0]": DOG}),
        (npz(image=IMAGE[None, :, :, 0], labels=["dog"]), {"data.npz[0]": DOG}),
        (rows({"image": IMAGE, "labels": "cat"}), {"the data[0]": CAT}),
        (rows({"image": np.zeros((1, 3, 28, 28)), "label": None}), {"the data[0]": ()}),
    ],
)
def test_images(write: Write, expected: dict[str, Any], judged: bool, tmp_path: Path) -> None:
    found = read(write(tmp_path) or tmp_path, images, judged)

    assert {example.name: example.labels for example in found} == expected
    for example in found:
        assert example.feeds["image"].shape == (3, 28, 28)
        assert example.feeds["image"].dtype == np.float32
        assert np.abs(example.feeds["image"]).max() < 4
        assert isinstance(example.source, Path | np.ndarray)


@for_both
def test_texts_and_tokens(judged: bool, tmp_path: Path) -> None:
    content = '\n{"text": "fine", "label": "good"}\n\n{"text": "one\u2028line", "labels": 0, "id": null}\n'
    found = read(text(content + '{"text": "so so"}\n')(tmp_path), texts, judged)

    assert [(one.name, one.labels, one.source) for one in found] == [
        ("lines.jsonl:2", ("good",), "fine"),
        ("lines.jsonl:4", ("bad",), "one\u2028line"),  # an editor counts lines so
        ("lines.jsonl:5", (), "so so"),
    ]
    assert found[0].feeds["tokens"].shape == (32,)
    assert int(found[0].feeds["tokens_mask"].sum()) == 6  # [CLS], four bytes, [SEP]
    (dictionary,) = read([{"text": "fine", "label": "good"}], texts, judged)
    assert dictionary.digest == found[0].digest
    tokens = read(archive(tmp_path, tokens=FIRST, labels=[1, 0]), texts, judged)
    assert [one.labels for one in tokens] == [("good",), ("bad",)]


@for_both
def test_a_split_model_is_given_the_inputs_of_all_parts(judged: bool) -> None:
    whole = texts.parts["model"]
    latents, queries = TensorSpec("latents", "float32", (1, 4, 8)), TensorSpec("queries", "int32", (1, 2))
    parts = {
        "encoder": Part("model.onnx", whole.inputs, (latents,)),
        "decoder": Part("model.onnx", (latents, queries, spec("point_queries", 2)), whole.outputs),
    }
    split = msgspec.structs.replace(texts, parts=parts, outputs=whole.outputs)
    (example,) = read([{"text": "a", "point_queries": np.zeros(2, np.float32), "label": 1}], split, judged)

    assert set(example.feeds) == {"tokens", "tokens_mask", "point_queries"}
    assert example.labels == ("good",)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("works", ""),
        ("fails_at_once", r"sample 0: KeyError\('x'\)"),
        ("fails_later", "sample 1: ZeroDivisionError"),
        ("leaves_at_once", r"sample 0: SystemExit\(0\)"),
        ("leaves_later", r"sample 1: SystemExit\(0\)"),
        ("no_iterable", "sample 0: TypeError"),
        ("no_dicts", "sample 0: TypeError"),
        ("needs", "sample 0: TypeError"),
        ("not_there", "has no function 'not_there'"),
        ("", "has no function ''"),
    ],
)
def test_a_function_of_the_directory_where_the_command_is_typed(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_data.py").write_text(
        "import numpy\n"
        "def works():\n    for _ in range(3): yield dict(tokens=numpy.ones(32, int), label=1)\n"
        "def fails_at_once(): raise KeyError('x')\n"
        "def fails_later():\n    yield dict(tokens=numpy.ones(32, int))\n    1 / 0\n"
        "def leaves_at_once(): raise SystemExit(0)\n"
        "def leaves_later():\n    yield dict(tokens=numpy.ones(32, int))\n    raise SystemExit(0)\n"
        "def no_iterable(): return 3\n"
        "def no_dicts(): return [3]\n"
        "def needs(argument): ...\n"
    )
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    path = list(sys.path)

    if said:
        with pytest.raises(DataError, match=f"^own_data(:{name} .*| ){said}"):
            read(f"own_data:{name}", texts)
    else:
        assert [one.name for one in read("own_data:works", texts)] == [f"own_data:works[{row}]" for row in range(3)]
    assert sys.path == path
    with pytest.raises(DataError):
        read("absent:samples", texts)


@for_both
@pytest.mark.parametrize(
    "write",
    [
        saved(*(f"{name}/{row}.png" for name in ("cat", "dog") for row in range(4))),
        table("file,label\n" + "a.png,cat\n" * 4 + "sub/b.png,dog\n" * 4),
        npz(image=np.stack([IMAGE] * 8), labels=[0] * 4 + [1] * 4),
        shards,
        rows(*({"image": IMAGE, "label": row // 4} for row in range(8))),
    ],
    ids=["folders", "csv", "npz", "shards", "list"],
)
def test_samples_are_spread_over_sorted_data(write: Write, judged: bool, tmp_path: Path) -> None:
    data = write(tmp_path) or tmp_path

    assert [one.labels for one in read(data, images, judged, samples=4)] == [CAT, CAT, DOG, DOG]
    assert len(read(data, images, judged, samples=9)) == 8


@for_both
def test_samples_of_lines_are_spread_and_of_an_endless_stream_the_first(judged: bool, tmp_path: Path) -> None:
    path = lines(*({"text": str(row), "label": row // 4} for row in range(8)))(tmp_path)
    assert [one.name for one in read(path, texts, judged, samples=2)] == ["lines.jsonl:1", "lines.jsonl:5"]

    endless = ({"text": "a", "label": 1} for _ in itertools.count())
    assert len(read(endless, texts, judged, samples=3)) == 3


@for_both
def test_numbers_of_another_width_are_read_alike(judged: bool, tmp_path: Path) -> None:
    given = np.random.default_rng(0).normal(size=(20, 3))
    for shape in ((20, 3), (1, 20, 3)):
        (example,) = read(archive(tmp_path, points=given.reshape(1, *shape)), points, judged)
        np.testing.assert_array_equal(example.feeds["points"], given.astype(np.float32))
    for dtype in (np.int16, np.int64, np.uint8):
        found = np.stack([one.feeds["tokens"] for one in read([{"tokens": row.astype(dtype)} for row in FIRST], texts)])
        np.testing.assert_array_equal(found, FIRST)
        assert found.dtype == np.int32


@for_both
@pytest.mark.parametrize("dtype", [None, bool, np.uint8, np.int64])
def test_no_mask_is_a_mask_of_ones_of_any_whole_dtype(dtype: Any, judged: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {} if dtype is None else {"entities_mask": ONES.astype(dtype)}
    found = read(archive(tmp_path, entities=ENTITIES, **given), sets, judged)

    for example in found:
        assert example.feeds["entities_mask"].dtype == np.int32
        np.testing.assert_array_equal(example.feeds["entities_mask"], ONES[0])
    # Or samples that were calibrated on could be certified on.
    assert [one.digest for one in found] == [one.digest for one in read(archive(tmp_path, entities=ENTITIES), sets)]


@for_both
@pytest.mark.parametrize("axes", [(), (1,)])
def test_pixels_of_frames_are_prepared(axes: tuple[int, ...], judged: bool, tmp_path: Path) -> None:
    data = archive(tmp_path, frames=PIXELS.reshape(3, *axes, 2, 16, 24, 3), flow=np.zeros((3, 16, 24, 2), np.float32))
    expected = np.moveaxis((PIXELS / 255.0 * 2.0 - 1.0).astype(np.float32), -1, 2)

    found = read(data, flow, judged)
    np.testing.assert_array_equal(np.stack([one.feeds["frames"] for one in found]), expected)
    assert [set(one.targets) for one in found] == [{"flow"}] * 3


def test_a_masked_language_model_is_judged_by_what_is_masked_and_calibrated_on_the_text() -> None:
    data = [{"text": "The quick brown fox jumps over"}]
    (calibrated,), (validated,) = read(data, language), read(data, language, judged=True)
    tokens, hidden = validated.feeds["tokens"], validated.targets["tokens"]

    assert (validated.digest, set(validated.targets)) == (calibrated.digest, {"tokens"})
    assert int((hidden >= 0).sum()) == 4  # 15 % of 30 bytes
    assert (tokens[hidden >= 0] == 3).all()
    np.testing.assert_array_equal(np.where(hidden >= 0, hidden, tokens), calibrated.feeds["tokens"])
    (again,) = read(data, language, judged=True)
    np.testing.assert_array_equal(again.feeds["tokens"], tokens)


@for_both
def test_targets(judged: bool) -> None:
    frames, audio = np.zeros((2, 16, 16, 3), np.float32), np.zeros((480, 1), np.float32)
    (example,) = read([{"frames": frames, "audio": audio, "labels": 4}], video, judged)
    assert set(example.targets) == {"frames", "audio", "label"}

    given = {"entities": ENTITIES[0], "wanted": np.arange(3.0), "kind": "a", "tags": [[1], [1, 2]], "id": None}
    (example,) = read([given], sets, judged)
    np.testing.assert_array_equal(example.targets["wanted"], np.arange(3.0))
    assert set(example.targets) == {"wanted", "kind"}  # none that no metric could judge by


@pytest.mark.parametrize("known", [262, 40, 3])
def test_random_inputs_are_inputs_that_the_model_takes(known: int) -> None:
    """Also of a vocabulary smaller than the papers' 262 bytes."""
    tokens = msgspec.structs.replace(TOKENS, values=(0, known - 1))
    model = manifest("arrays", (tokens, spec("x", 4)), (spec("y", 2),))
    drawn = list(itertools.islice(Samples("random", model).stream, 20))
    found = [one.feeds["tokens"] for one in drawn]
    assert (np.min(found), np.max(found)) == (6 if known > 6 else 0, known - 1)
    assert all(np.isfinite(one.feeds["x"]).all() for one in drawn)
    with pytest.raises(DataError, match="random"):
        Samples("random", model, judged=True)


def cut_short() -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    return file.getvalue()[:1000]


def failing(folder: Path) -> Iterator[dict[str, Any]]:
    yield {"image": np.zeros((3, 28, 28), np.float32)}
    raise ValueError("the camera is off")


def masks_of(value: int) -> Any:
    return np.where(np.arange(3)[:, None] == 1, value, ONES)


# Each with what the message names.
REFUSED: list[tuple[Manifest, Write, str]] = [
    # files that hold no data
    (images, lambda folder: folder / "absent", "absent"),
    (images, lambda folder: folder, "no samples"),
    (images, text("", "text.txt"), "text.txt"),
    (texts, saved("a.png"), "text-classification"),
    (texts, lines(), "no samples"),
    (images, npz(), "contains no arrays"),
    (images, npz(image=np.zeros((0, 4, 4), np.uint8)), "no samples"),
    (texts, npz(tokens=np.array(3)), "no samples"),
    (images, text("text", "data.npz"), "data.npz is not a readable .npz"),
    (images, npz(image=np.array([None])), "data.npz is not a readable .npz"),
    (points, lines({"text": "a"}), "lines.jsonl"),
    (images, text(cut_short(), "a.png"), "^[^:]*a.png is not a readable image: .*\nhint: give a complete"),
    (images, rows({}), r"the data\[0\] has no 'image'"),
    (images, rows({3: IMAGE}), "the data .*sample 0: .*names"),
    (images, rows({"image": IMAGE}, 3), "the data .*sample 1: .*int"),
    (images, failing, "sample 1: ValueError"),
    # lines
    (texts, text('{"text": "a"}\n{'), "lines.jsonl:2"),
    *((texts, lines(row), "lines.jsonl:1 .*`text`") for row in ({"txt": 1}, "text", {"text": 1})),
    (texts, text(b'{"text": "\xff"}'), "lines.jsonl:1 is not JSON"),
    (texts, lines({"text": "a" * 500}), "lines.jsonl:1: .* 500 bytes"),
    (texts, lines({"text": ""}), "lines.jsonl:1: .* empty"),
    (texts, lines({"text": "a", "label": "ugly"}), "lines.jsonl:1: 'ugly'"),
    # labels
    (images, table(""), "labels.csv"),
    (images, table("name,class\na.png,0\n"), "labels.csv"),
    (images, table("file,label\nb.png,0\n"), "'b.png'"),
    (images, table(b"file,label\na.png,\xff\n"), "a.png: .* is not a label"),
    (images, table("file,label\na.png," + "a" * 200_000), "labels.csv cannot be read"),
    *((images, table(f"file,label\na.png,{label}\n"), f"a.png: '{label}'") for label in ("bird", "3", "", "²", "--5")),
    (images, saved("bird/a.png"), "bird/a.png: 'bird'"),
    (images, npz(image=np.zeros((2, 4, 4), np.uint8), labels=[0] * 3), "data.npz contains"),
    *((images, npz(image=IMAGE[None], labels=[label]), rf"data.npz\[0\]: {label}") for label in (0.5, 3, -1)),
    (images, npz(image=IMAGE[None], labels=[1], label=[1]), "`label` and `labels`"),
    # images
    (images, npz(picture=np.zeros((1, 4, 4), np.uint8)), r"data.npz\[0\] has no 'image'"),
    (images, npz(image=np.zeros((1, 4, 4))), r"\[0\]: 'image' .*\[4, 4\]"),
    (images, npz(image=np.zeros((4, 4), np.uint8)), r"data.npz\[0\]: .*\[4\]"),
    (images, npz(image=np.zeros((1, 9, 9, 5), np.uint8)), r"\[0\]: .*9, 9, 5"),
    (images, rows({"image": np.zeros((9, 9), np.int64)}), r"the data\[0\]: .*int64"),
    (images, text("text", "a.png"), "^[^:]*a.png is not a readable image: cannot identify image file\n"),
    # arrays
    (texts, npz(other=np.zeros(3)), r"data.npz\[0\] has no 'tokens', .*'other'"),
    (texts, npz(tokens=FIRST, tokens_mask=ONES), "data.npz contains"),
    (texts, npz(tokens=FIRST * 1.0), r"data.npz\[0\]: 'tokens' is float64"),
    (points, npz(points=np.ones((1, 20, 3), int)), "'points' is int64"),
    (points, npz(points=np.ones((1, 20, 3), complex)), "complex128"),
    (points, npz(points=np.ones((4, 9, 3))), r"'points' .*\[9, 3\]"),
    (texts, npz(tokens=FIRST[None]), r"'tokens' .*\[2, 32\]"),
    (points, rows({"points": [[0.0] * 3] * 20}), r"the data\[0\]: 'points' is of type list"),
    *((points, npz(points=np.full((1, 20, 3), value)), "'points' contains NaN, or") for value in (np.nan, 1e300)),
    (texts, npz(tokens=FIRST + 2**32), "'tokens' contains .*int32"),
    *((texts, npz(tokens=FIRST + by), rf"data.npz\[0\]: 'tokens' contains {70 + by}") for by in (192, -75)),
    (flow, npz(frames=PIXELS, flow=np.zeros((3, 2))), r"data.npz\[0\]: `flow`"),
    # masks
    (sets, npz(entities=ENTITIES, entities_mask=masks_of(0)), r"data\.npz\[1\]: .* by 'entities_mask'"),
    (sets, npz(entities=ENTITIES, entities_mask=masks_of(12)), "'entities_mask' contains 12"),
    (sets, npz(entities=ENTITIES, entities_mask=ONES[:, :9]), r"'entities_mask' .*\[9\]"),
    (flow, npz(frames=PIXELS, frames_mask=np.ones((3, 2), int)), "'frames_mask'"),
    (sets, npz(entities=ENTITIES, entitis_mask=ONES), "'entitis_mask'"),
]


@for_both
@pytest.mark.parametrize(("model", "write", "said"), REFUSED)
def test_data_that_does_not_fit_is_refused(
    model: Manifest, write: Write, said: str, judged: bool, tmp_path: Path
) -> None:
    data = write(tmp_path)
    with pytest.raises(DataError, match=said):
        read(tmp_path if data is None else data, model, judged)


@for_both
def test_texts_that_are_too_long_are_left_out_and_counted(judged: bool, tmp_path: Path) -> None:
    path = lines({"text": "a"}, {"text": "a" * 500}, {"text": "b"}, {"text": "a" * 600})(tmp_path)
    opened = Samples(path, texts, judged=judged)
    assert [example.source for example in opened.stream] == ["a", "b"]
    assert [said.split(":")[1] for said in opened.notes.left_out.values()] == ["2", "4"]
    assert "2 of 4" in opened.notes.by_kind()["left out"]
    with pytest.raises(DataError, match="shard 2/2"):
        list(Samples(path, texts, judged=judged, shard=(2, 2)).stream)


@for_both
@pytest.mark.parametrize("cut", [0, 0.5, None])
def test_an_archive_that_is_cut_or_has_a_bit_flipped(cut: float | None, judged: bool, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, image=np.random.default_rng(0).integers(0, 255, (50, 28, 28), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])

    with pytest.raises(DataError, match=r"data\.npz"):
        read(path, images, judged)


def test_labels_and_names_are_checked_before_the_first_sample(tmp_path: Path) -> None:
    for arrays in ({"labels": [0, 0, 3]}, {"label": ["cat", "cat", "bird"]}):
        with pytest.raises(DataError, match=r"data.npz\[2\]"):
            Samples(archive(tmp_path, image=np.stack([IMAGE] * 3), **arrays), images, samples=1)
    archive(tmp_path, "later.npz", picture=np.zeros(1))
    with pytest.raises(DataError, match=r"later.npz\[0\] has no 'image'"):
        Samples(archive(tmp_path, image=IMAGE[None]).parent, images)


def test_samples_that_differ_are_not_stacked() -> None:
    """Some labelled, and some not; targets of two shapes."""
    one, other = Example("a", {}, {"label": np.zeros(2)}), Example("b", {}, {"label": np.zeros(3)})
    with pytest.raises(DataError, match=r"b: 'label' has shape \[3\]"):
        stack([one, other], "targets")
    for mixed in ([one, Example("bare", {}, {})], [Example("bare", {}, {}), one]):
        with pytest.raises(DataError, match="only some samples have a label: bare has none"):
            stack(mixed, "targets")


@for_both
def test_images_without_a_row_are_noted(judged: bool, tmp_path: Path) -> None:
    table("file,label\na.png,cat\n")(tmp_path)
    notes = Samples(tmp_path, images, judged=judged).notes.by_kind()
    assert notes == {"unlisted": f"1 of 2 images have no row in labels.csv, first {tmp_path / 'sub' / 'b.png'}"}
