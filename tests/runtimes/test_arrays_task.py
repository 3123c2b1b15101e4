# SPDX-License-Identifier: Apache-2.0
"""Models of your own and of sets: arrays in, arrays out, with and without a batch; and `run` on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.manifest import Part, TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.arrays import Arrays, Sets, read_arrays
from perceiver_export.runtimes.tasks.base import interface
from tests.runtimes.conftest import Ask
from tests.runtimes.models import NumpyEngine, manifest, opened, spec

N, C, E = 6, 4, 2
RNG = np.random.default_rng(0)
LEFT, RIGHT = RNG.normal(size=(5, 2, 3)).astype(np.float32), RNG.integers(-9, 9, (5, 4), dtype=np.int32)
TOTALS = LEFT.sum(axis=(1, 2)) + RIGHT.sum(axis=1)


def sums(names: tuple[str, ...], feeds: Feeds) -> dict[str, Array]:
    """Each of ``names``: the sum of all inputs over everything but the batch."""
    total = sum(array.reshape(len(array), -1).sum(axis=1, keepdims=True) for array in feeds.values())
    return {name: np.asarray(total, np.float32) for name in names}


def rows(feeds: Feeds) -> dict[str, Array]:
    """An entity's first channels and the sum of all that count: each answer depends on the others, as in a model."""
    mask = feeds.get("entities_mask", np.ones(feeds["entities"].shape[:2], np.int32))
    total = (feeds["entities"] * mask[..., None]).sum(axis=1, keepdims=True)
    return {"outputs": (feeds["entities"] + total)[..., :E].astype(np.float32)}


def arrays_of(*inputs: TensorSpec, outputs: tuple[str, ...] = ("total",)) -> tuple[Arrays, NumpyEngine]:
    gives = tuple(spec(name, inputs[0].shape[0], 1, **inputs[0].ranges) for name in outputs)
    engine = NumpyEngine(lambda feeds: sums(outputs, feeds), inputs, gives)
    return opened(Arrays, manifest("arrays", engine), engine), engine


def sets_of(masked: bool = True, batch: int = 1) -> tuple[Sets, NumpyEngine]:
    inputs = (spec("entities", batch, N, C), spec("entities_mask", batch, N, dtype="int32"))[: 1 + masked]
    engine = NumpyEngine(rows, inputs, (spec("outputs", batch, N, E),))
    return opened(Sets, manifest("sets", engine), engine), engine


def two(batch: int | str = 1, **ranges: tuple[int, int]) -> tuple[Arrays, NumpyEngine]:
    return arrays_of(spec("left", batch, 2, 3, **ranges), spec("right", batch, 4, dtype="int32", **ranges))


@pytest.mark.parametrize(("batch", "ranges"), [(1, {}), (2, {}), (8, {}), ("n", {"n": (1, 4)}), ("n", {"n": (3, 9)})])
def test_any_number_of_samples_goes_through_any_batch(batch: int | str, ranges: dict[str, tuple[int, int]]) -> None:
    task, _ = two(batch, **ranges)
    for count in (1, 4, 5):
        outputs = task({"left": LEFT[:count], "right": RIGHT[:count]})
        assert outputs.keys() == {"total"}
        np.testing.assert_allclose(outputs["total"], TOTALS[:count, None], rtol=1e-5)
    total = task({"left": LEFT[0], "right": RIGHT[0]})["total"]
    assert total.shape == (1,)  # without a batch, as its inputs
    np.testing.assert_allclose(total, TOTALS[:1], rtol=1e-5)


def test_numbers_are_converted_where_they_keep_their_meaning() -> None:
    task, engine = two()
    task({"left": LEFT[:1].astype(np.float64), "right": RIGHT[:1].astype(np.int64)})
    task({"left": LEFT[:1].astype(np.float16), "right": RIGHT[:1] > 0})

    assert {array.dtype.name for call in engine.calls for array in call.values()} == {"float32", "int32"}
    np.testing.assert_array_equal(engine.calls[1]["right"], RIGHT[:1] > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": None}, "the arrays are 'right'"),
        ({"more": LEFT}, "'more'"),
        ({"left": LEFT[0], "right": RIGHT}, "number of dimensions"),
        ({"left": LEFT[0, 0], "right": RIGHT[0]}, "number of dimensions"),
        ({"left": LEFT[:2]}, "'left' has 2, 'right' has 5"),
        ({"left": LEFT[:0], "right": RIGHT[:0]}, "'left' has 0"),
        ({"left": LEFT[:, :1]}, "left"),
        ({"right": RIGHT.astype(np.float32)}, "float32, but the model takes int32"),
        ({"left": LEFT.astype(np.int32)}, "int32, but the model takes float32"),
        ({"left": LEFT.astype(str)}, "<U"),
        ({"right": np.full((5, 4), 1 << 40)}, "1099511627776"),
        ({"left": np.full((5, 2, 3), 1e300)}, r"1e\+300"),
        ({"left": LEFT * np.nan}, "'left' contains NaN or infinity"),
        ({"left": np.full_like(LEFT, np.inf)}, "'left' contains NaN or infinity"),
        ({"left": [1, 2]}, "of type list"),
    ],
)
def test_arrays_that_the_model_does_not_take_are_refused(changes: dict[str, Any], message: str) -> None:
    task, engine = two()
    given = {"left": LEFT, "right": RIGHT, **changes}
    with pytest.raises(InputError, match=message):
        task({name: array for name, array in given.items() if array is not None})

    assert not engine.calls


def test_a_model_with_one_input_takes_the_array_alone() -> None:
    task, _ = arrays_of(spec("x", 1, 3))
    assert task(np.array([1, 2, 3.5]))["total"].tolist() == [6.5]
    assert task({"x": np.array([[1, 2, 3.5]])})["total"].tolist() == [[6.5]]
    with pytest.raises(InputError, match="the arrays are 'left'"):
        two()[0](LEFT)


def test_masks_that_leave_nothing_are_refused() -> None:
    x, mask = spec("x", 1, 3), spec("x_mask", 1, 3, dtype="int32")
    y, other = spec("y", 1, 3), spec("y_mask", 1, 3, dtype="int32")
    ones, none = np.ones((2, 3), np.float32), np.array([[0, 1, 0], [0, 0, 0]])

    with pytest.raises(InputError, match="sample 1 are masked by 'x_mask'"):
        arrays_of(x, mask)[0]({"x": ones, "x_mask": none})
    with pytest.raises(InputError, match="sample 0 are masked by 'x_mask'"):
        arrays_of(x, mask)[0]({"x": ones[0], "x_mask": np.zeros(3, int)})
    with pytest.raises(InputError, match="the model takes 0 to 1"):
        arrays_of(x, mask)[0]({"x": ones, "x_mask": none + 1})
    with pytest.raises(InputError, match="sample 1 are masked by 'x_mask' and 'y_mask'"):
        arrays_of(x, mask, y, other)[0]({"x": ones, "x_mask": none, "y": ones, "y_mask": none})
    queries = spec("y_queries", 1, 2, 3)
    with pytest.raises(InputError, match="sample 1 are masked by 'x_mask'"):
        arrays_of(x, mask, queries)[0]({"x": ones, "x_mask": none, "y_queries": np.ones((2, 2, 3), np.float32)})
    # One modality of two may be absent.
    arrays_of(x, mask, y, other)[0]({"x": ones, "x_mask": none, "y": ones, "y_mask": 1 - none})
    arrays_of(x, mask, y)[0]({"x": ones, "x_mask": none, "y": ones})


def test_the_interface_of_a_split_bundle_has_its_given_queries() -> None:
    x, latents, given = spec("x", 1, 3), spec("latents", 1, 2, 2), spec("y_queries", 1, 5, 2)
    index, y = spec("queries", 1, 4, dtype="int32"), spec("y", 1, 5)
    parts = {
        "encoder": Part("e.onnx", (x,), (latents,)),
        "decoder_y": Part("d.onnx", (latents, given), (y,)),
        "decoder_z": Part("z.onnx", (latents, index), (spec("z", 1, 4, 1),)),
    }
    outputs = (y, spec("z", 1, 9))

    assert interface(manifest("arrays", parts, outputs=outputs)) == ((x, given), outputs)


@pytest.mark.parametrize("batch", [1, 3])
def test_sets_of_any_size_are_padded_and_masked(batch: int) -> None:
    task, engine = sets_of(batch=batch)
    entities = RNG.normal(size=(4, C)).astype(np.float32)
    found = task(entities)

    assert found.shape == (4, E)
    np.testing.assert_allclose(found, (entities + entities.sum(axis=0))[:, :E], rtol=1e-5)
    assert engine.calls[0]["entities"].shape == (batch, N, C)
    assert engine.calls[0]["entities_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]


def test_sets_of_different_sizes_come_with_a_mask() -> None:
    task, _ = sets_of()
    entities = RNG.normal(size=(2, 4, C))
    mask = np.array([[True, True, True, False], [False, True, False, False]])
    found = task(entities, mask)

    assert found.shape == (2, 4, E)
    np.testing.assert_allclose(found[0, :3], task(entities[0, :3]), rtol=1e-5)
    np.testing.assert_allclose(found[1, 1], task(entities[1, 1:2])[0], rtol=1e-5)
    np.testing.assert_array_equal(task(entities[0], mask[0]), found[0])


def test_a_token_outside_the_vocabulary_is_refused_before_anything_runs() -> None:
    task, engine = arrays_of(TensorSpec("tokens", "int32", (1, 4), values=(0, 9)))
    tokens = np.zeros((5, 4), np.int32)
    tokens[4, 3] = 10
    with pytest.raises(InputError, match="10"):
        task({"tokens": tokens})

    assert not engine.calls


@pytest.mark.parametrize(
    ("entities", "mask", "message"),
    [
        (np.zeros((0, C)), None, "shape"),
        (np.zeros((0, 2, C)), None, "shape"),
        (np.zeros((N + 1, C)), None, f"{N + 1}"),
        (np.zeros((2, C + 1)), None, "shape"),
        (np.zeros(C), None, "shape"),
        (np.zeros((1, 1, 2, C)), None, "shape"),
        (np.full((2, C), np.nan), None, "NaN or infinity"),
        (np.zeros((2, C), np.int32), None, "int32"),
        (np.zeros((2, C)), np.zeros(2, np.int32), "are masked"),
        (np.zeros((2, 2, C)), np.array([[1, 0], [0, 0]]), "sample 1 are masked"),
        (np.zeros((2, C)), np.ones(3, np.int32), "the mask has shape"),
        (np.zeros((2, C)), np.ones((1, 2), np.int32), "the mask has shape"),
        (np.zeros((2, C)), np.array([1, 2]), "the model takes 0 to 1"),
        (np.zeros((2, C)), np.array([1.0, 0.0]), "float64"),
    ],
)
def test_what_is_no_set_is_refused(entities: Any, mask: Any, message: str) -> None:
    task, engine = sets_of()
    with pytest.raises(InputError, match=message):
        task(entities, mask)

    assert not engine.calls


def test_a_model_of_sets_without_a_mask_needs_all_its_entities() -> None:
    task, _ = sets_of(masked=False)
    assert task(np.ones((N, C))).shape == (N, E)
    with pytest.raises(InputError, match="2 entities"):
        task(np.ones((2, C)))
    with pytest.raises(InputError, match="cannot take a mask"):
        task(np.ones((N, C)), np.ones(N, np.int32))


def test_manifests_that_do_not_fit_are_refused() -> None:
    x, y = spec("x", 1, 3), spec("outputs", 1, N, E)
    for inputs, outputs in [((), (x,)), ((x,), ()), ((spec("x"),), (x,)), ((x,), (spec("y"),))]:
        with pytest.raises(BundleError):
            Arrays.check(manifest("arrays", {"model": Part("m.onnx", inputs, outputs)}))
    entities, mask = spec("entities", 1, N, C), spec("entities_mask", 1, N, dtype="int32")
    for inputs, outputs in [
        ((x,), (y,)),
        ((spec("entities", 1, N),), (y,)),
        ((entities, x), (y,)),
        ((entities, spec("entities_mask", 1, N + 1)), (y,)),
        ((entities, mask), (spec("outputs", 1, N + 1, E),)),
        ((entities, mask), (spec("logits", 1, N, E),)),
    ]:
        with pytest.raises(BundleError):
            Sets.check(manifest("sets", {"model": Part("m.onnx", inputs, outputs)}))


def test_files_of_arrays_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """What archives may be is in test_npz."""
    np.savez_compressed(tmp_path / "good.npz", x=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-30])
    for name in ("cut.npz", "absent.npz", "a.txt", ""):
        with pytest.raises(InputError):
            read_arrays(tmp_path / name)

    found = read_arrays(tmp_path / "good.npz")
    assert isinstance(found, dict)
    assert found["x"].tolist() == list(range(1000))


def test_run_writes_the_outputs_and_prints_what_they_are(ask: Ask, tmp_path: Path) -> None:
    # `file` is what numpy.savez calls its own first parameter.
    task, _ = arrays_of(spec("left", 1, 2, 3), spec("right", 1, 4, dtype="int32"), outputs=("total", "file"))
    np.savez(tmp_path / "in.npz", left=LEFT, right=RIGHT)
    shown = ask(task, tmp_path / "in.npz", output=tmp_path / "out.npz")

    assert "5 × 1" in shown
    assert f"{TOTALS.max():.6g}"[:5] in shown
    with np.load(tmp_path / "out.npz") as written:
        assert sorted(written.files) == ["file", "total"]
        np.testing.assert_allclose(written["file"], TOTALS[:, None], rtol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_run_prints_json_and_refuses_what_it_cannot_do(ask: Ask, tmp_path: Path) -> None:
    task, engine = arrays_of(spec("x", 1, 3))
    file = tmp_path / "x.npy"
    np.save(file, np.array([[1, 2, 3.0], [4, 5, 6.0]]))
    for inputs, output in (([file, file], None), ([file], tmp_path / "out.npy"), ([file], tmp_path)):
        with pytest.raises(UsageError):
            ask(task, *inputs, output=output)
    assert not engine.calls

    total = ask(task, file, as_json=True)["outputs"]["total"]
    assert total == {"dtype": "float32", "shape": [2, 1], "min": 6.0, "mean": 10.5, "max": 15.0}


def test_run_takes_sets_from_both_kinds_of_file(ask: Ask, tmp_path: Path) -> None:
    entities = RNG.normal(size=(3, C))
    np.save(tmp_path / "a.npy", entities)
    np.savez(tmp_path / "a.npz", entities=entities, entities_mask=np.array([1, 1, 1]))
    np.savez(tmp_path / "wrong.npz", units=entities)
    one, other = (ask(sets_of()[0], tmp_path / name, as_json=True)["outputs"]["outputs"] for name in ("a.npy", "a.npz"))

    assert one == other
    assert one["shape"] == [3, E]
    with pytest.raises(InputError, match="'units'"):
        ask(sets_of()[0], tmp_path / "wrong.npz")
