# SPDX-License-Identifier: Apache-2.0
"""Your own models, and models of sets: arrays in, arrays out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.manifest import Manifest, TensorSpec
from perceiver_export.runtimes.npz import read_npz
from perceiver_export.runtimes.runtime import Array, check_values
from perceiver_export.runtimes.tasks.base import (
    Shape,
    Task,
    check_interface,
    count_samples,
    interface,
    limits,
    misfit,
    run_batched,
)
from perceiver_export.runtimes.tasks.images import load_npy


class Arrays(Task):
    """``run({"name": array, ...})`` -> outputs by name; a model with one input takes the array alone.

    Arrays come with a batch dimension of any size or, all of them, without; the outputs then have none either. Numbers
    are converted where that keeps their meaning: floating point to float32, whole numbers and booleans to int32.
    """

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError where a tensor has no batch dimension."""
        inputs, outputs = interface(manifest)
        if not inputs or not outputs or not all(spec.shape for spec in (*inputs, *outputs)):
            raise misfit("the model has no input, no output, or one without a batch dimension")

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]] | npt.NDArray[Any]) -> dict[str, Array]:
        """All outputs.

        Raises InputError: arrays that the model does not take or that are not finite, tokens that it does not know,
        masks that mask everything.
        """
        specs, _ = interface(self.manifest)
        given = arrays if isinstance(arrays, Mapping) else {specs[0].name: arrays}
        if given.keys() != {spec.name for spec in specs}:
            raise InputError(f"given are {', '.join(map(repr, given)) or 'no arrays'}", f"give {_shapes(specs)}")
        feeds = {spec.name: _converted(given[spec.name], spec) for spec in specs}
        ranks = {feeds[spec.name].ndim - len(spec.shape) for spec in specs}
        if ranks not in ({0}, {-1}):
            found = ", ".join(f"{spec.name!r} has {list(feeds[spec.name].shape)}" for spec in specs)
            raise InputError(
                f"dimensions do not fit: {found}", f"give {_shapes(specs)}, all with a batch or all without"
            )
        if ranks == {-1}:
            feeds = {name: array[None] for name, array in feeds.items()}
        count_samples(feeds)
        for name, array in feeds.items():
            if not np.isfinite(array).all():
                raise InputError(f"{name!r} holds values that are not finite numbers", "mask them, or give 0 for them")
        check_masks(feeds, specs)
        for spec in specs:
            check_values(feeds[spec.name], spec)
        outputs = run_batched(self.runtime, feeds)
        return {name: array[0] for name, array in outputs.items()} if ranks == {-1} else outputs


class Sets(Task):
    """``run(entities)`` -> one row an entity. Sets with fewer entities than the model takes are padded and masked.

    ``entities`` are (n, C), or (batch, n, C) with a ``mask`` (batch, n) where the sets differ in size: 1 is an entity,
    0 is none. The answer is (n, E) or (batch, n, E); rows of masked entities mean nothing.
    """

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a model of sets, a row out for each row in."""
        inputs = {spec.name: spec for spec in interface(manifest)[0]}
        entities = inputs.get("entities")
        size = entities.shape[1] if entities is not None and len(entities.shape) == 3 else None
        if not isinstance(size, int):
            raise misfit("the model has no input `entities` of a fixed size")
        expected: dict[str, Shape] = {"entities": (size, None)}
        if "entities_mask" in inputs:
            expected["entities_mask"] = (size,)
        check_interface(manifest, expected, {"outputs": (size, None)})

    def __call__(self, entities: npt.NDArray[Any], mask: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float32]:
        """The outputs (n, E) or (batch, n, E).

        Raises InputError: no entity, more than the model takes, fewer if it has no mask, not finite, a wrong shape, or
        a mask that does not fit or masks everything.
        """
        specs = {spec.name: spec for spec in interface(self.manifest)[0]}
        spec = specs["entities"]
        rows = _converted(entities, spec)
        alone = rows.ndim == 2
        rows = rows[None] if alone else rows
        most, channels = limits(spec, 1)[1], spec.shape[2]
        if rows.ndim != 3 or rows.shape[2] != channels or not 0 < rows.shape[1] <= most or not len(rows):
            raise InputError(f"the entities have shape {list(rows.shape)}", f"give (n, {channels}), n from 1 to {most}")
        if not np.isfinite(rows).all():
            raise InputError("the entities hold values that are not finite numbers", "take those entities out")
        count = rows.shape[1]
        feeds = {"entities": np.pad(rows, ((0, 0), (0, most - count), (0, 0)))}
        if "entities_mask" in specs:
            shape = entities.shape[:-1]
            flags = np.ones(shape, np.int32) if mask is None else _converted(mask, specs["entities_mask"])
            if flags.shape != shape:
                raise InputError(f"the mask has shape {list(flags.shape)}", f"the entities want {list(shape)}")
            feeds["entities_mask"] = np.pad(flags.reshape(rows.shape[:2]), ((0, 0), (0, most - count)))
        elif mask is not None or count < most:
            given = "a mask is given" if mask is not None else f"entities given: {count}"
            raise InputError(given, f"the model has no mask: give {most} entities and nothing else")
        check_masks(feeds, tuple(specs.values()))
        outputs = run_batched(self.runtime, feeds)["outputs"][:, :count]
        return outputs[0] if alone else outputs


def check_masks(feeds: Mapping[str, Array], specs: tuple[TensorSpec, ...]) -> None:
    """Masks are called ``NAME_mask``; one input of several may be masked altogether, all of them may not.

    Queries that are given, ``NAME_queries``, ask the model something and tell it nothing. Arrays are with the batch.
    Raises InputError.
    """
    masks = {s.name: feeds[s.name] for s in specs if s.dtype == "int32" and s.name.endswith("_mask")}
    for name in masks:
        check_values(feeds[name], next(spec for spec in specs if spec.name == name))
    told = [s.name for s in specs if s.name not in masks and not s.name.endswith("_queries")]
    if not masks or any(f"{name}_mask" not in masks for name in told):
        return
    left = np.stack([mask.reshape(len(mask), -1).any(axis=1) for mask in masks.values()]).any(axis=0)
    if not left.all():
        what = " and ".join(map(repr, masks))
        raise InputError(f"{what} masks everything of sample {np.argmin(left)}", "leave a 1 in each sample")


def read_arrays(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]] | npt.NDArray[Any]:
    """The arrays of a .npz file by name, or the one of a .npy file. Raises InputError; nothing in it is executed."""
    name, ending = os.fspath(path), Path(path).suffix.lower()
    if ending == ".npy":
        return load_npy(path)
    if ending != ".npz":
        raise InputError(f"{name} is neither .npz nor .npy", "write the inputs with numpy.savez(file, name=array)")
    return read_npz(path)


def _converted(array: npt.NDArray[Any], spec: TensorSpec) -> Array:
    """The array in the graph's dtype, where no number changes its meaning."""
    if not isinstance(array, np.ndarray):
        raise InputError(f"{spec.name!r} is of type {type(array).__name__}", "give a numpy array")
    wanted = np.dtype(spec.dtype)
    kinds = "f" if wanted.kind == "f" else "biu"
    if array.dtype == wanted:
        return array
    if array.dtype.kind not in kinds:
        raise InputError(
            f"{spec.name!r} has dtype {array.dtype}, the model takes {wanted}", f"use array.astype({str(wanted)!r})"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(wanted)
    lost = np.isinf(converted) & ~np.isinf(array) if wanted.kind == "f" else converted != array
    if lost.any():
        raise InputError(f"{spec.name!r} holds {array[lost][0]}, too much for {wanted}", "give smaller numbers")
    return converted


def _shapes(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in specs)
