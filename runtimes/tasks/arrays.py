# SPDX-License-Identifier: Apache-2.0
"""Models of sets, and models without a task of their own: arrays in, arrays out."""

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
from perceiver_export.runtimes.runtime import Array, check_values, count_samples
from perceiver_export.runtimes.tasks import base
from perceiver_export.runtimes.tasks.base import Shape, Task
from perceiver_export.runtimes.tasks.images import load_npy

_LABELS = ("label", "labels")  # files for `validate` have them too


class Arrays(Task):
    """``run({"name": array, ...})`` -> outputs by name; a model with one input takes the array alone.

    Either all arrays have a batch dimension, of any size, or none has one; then the outputs have none either. Values
    are converted if that does not change them: floating point to float32, integers and booleans to int32.
    """

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError if a tensor has no batch dimension."""
        inputs, outputs = base.interface(manifest)
        if not inputs or not outputs or not all(spec.shape for spec in (*inputs, *outputs)):
            raise base.misfit("the model has no input, no output, or a tensor without a batch dimension")

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]] | npt.NDArray[Any]) -> dict[str, Array]:
        """All outputs by name.

        Raises InputError: arrays with wrong names, shapes or dtypes, values that are not finite, unknown tokens, or
        masks that mask everything.
        """
        specs, _ = base.interface(self.manifest)
        names = {spec.name for spec in specs}
        given = arrays if isinstance(arrays, Mapping) else {specs[0].name: arrays}
        given = {name: array for name, array in given.items() if name in names or name not in _LABELS}
        if given.keys() != names:
            unknown = [name for name in given if name not in names] if given.keys() > names else []
            listed = f"the arrays are {', '.join(map(repr, given)) or 'missing'}"
            raise InputError(f"there is no input {unknown[0]!r}" if unknown else listed, f"give {_shapes(specs)}")
        feeds = {spec.name: _converted(given[spec.name], spec) for spec in specs}
        ranks = {feeds[spec.name].ndim - len(spec.shape) for spec in specs}
        if ranks not in ({0}, {-1}):
            found = ", ".join(f"{spec.name!r} has {list(feeds[spec.name].shape)}" for spec in specs)
            hint = f"give {_shapes(specs)}, all with a batch dimension or all without"
            raise InputError(f"the number of dimensions is wrong: {found}", hint)
        if ranks == {-1}:
            feeds = {name: array[None] for name, array in feeds.items()}
        count_samples(feeds)
        for name, array in feeds.items():
            if not np.isfinite(array).all():
                raise InputError(f"{name!r} contains NaN or infinity", "replace such values by 0, or mask them")
        for spec in specs:  # of all samples, before the first batch runs
            check_values(feeds[spec.name], spec)
        check_masks(feeds, specs)
        outputs = base.run_batched(self.runtime, feeds)
        return {name: array[0] for name, array in outputs.items()} if ranks == {-1} else outputs


class Sets(Task):
    """``run(entities)`` -> one row per entity. Sets with fewer entities than the model takes are padded and masked.

    ``entities`` is (n, C), or (batch, n, C) with a ``mask`` (batch, n) if the sets differ in size: 1 for an entity, 0
    for padding. The output is (n, E) or (batch, n, E); rows of masked entities are meaningless.
    """

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a model of sets, with one output row per entity."""
        inputs = {spec.name: spec for spec in base.interface(manifest)[0]}
        entities = inputs.get("entities")
        size = entities.shape[1] if entities is not None and len(entities.shape) == 3 else None
        if not isinstance(size, int):
            raise base.misfit("the model has no input `entities` of a fixed size")
        expected: dict[str, Shape] = {"entities": (size, None)}
        if "entities_mask" in inputs:
            expected["entities_mask"] = (size,)
        base.check_interface(manifest, expected, {"outputs": (size, None)})

    def __call__(self, entities: npt.NDArray[Any], mask: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float32]:
        """The outputs (n, E) or (batch, n, E).

        Raises InputError: no entities, more than the model takes, fewer although it has no mask, values that are not
        finite, a wrong shape, or a mask of the wrong shape or that masks everything.
        """
        specs = {spec.name: spec for spec in base.interface(self.manifest)[0]}
        spec = specs["entities"]
        rows = _converted(entities, spec)
        alone = rows.ndim == 2
        rows = rows[None] if alone else rows
        most, channels = spec.limits(1)[1], spec.shape[2]
        if rows.ndim != 3 or rows.shape[2] != channels or not 0 < rows.shape[1] <= most or not len(rows):
            raise InputError(f"the entities have shape {list(rows.shape)}", f"give (n, {channels}), n from 1 to {most}")
        if not np.isfinite(rows).all():
            raise InputError("the entities contain NaN or infinity", "remove those entities")
        count = rows.shape[1]
        feeds = {"entities": np.pad(rows, ((0, 0), (0, most - count), (0, 0)))}
        if "entities_mask" in specs:
            shape = entities.shape[:-1]
            flags = np.ones(shape, np.int32) if mask is None else _converted(mask, specs["entities_mask"])
            if flags.shape != shape:
                raise InputError(f"the mask has shape {list(flags.shape)}", f"give a mask of shape {list(shape)}")
            feeds["entities_mask"] = np.pad(flags.reshape(rows.shape[:2]), ((0, 0), (0, most - count)))
            check_values(feeds["entities_mask"], specs["entities_mask"])  # of all sets, before the first batch runs
        elif mask is not None or count < most:
            given = "a mask" if mask is not None else f"{count} entities"
            raise InputError(f"the model has no mask, and cannot take {given}", f"give {most} entities and no mask")
        check_masks(feeds, tuple(specs.values()))
        outputs = base.run_batched(self.runtime, feeds)["outputs"][:, :count]
        return outputs[0] if alone else outputs


def check_masks(feeds: Mapping[str, Array], specs: tuple[TensorSpec, ...]) -> None:
    """Raise InputError if the masks, inputs named ``NAME_mask``, mask all inputs of a sample.

    One of several inputs may be masked completely. Queries, named ``NAME_queries``, do not count as inputs, because
    they carry no information about the sample. Arrays have a batch dimension.
    """
    masks = {s.name: feeds[s.name] for s in specs if s.dtype == "int32" and s.name.endswith("_mask")}
    told = [s.name for s in specs if s.name not in masks and not s.name.endswith("_queries")]
    if not masks or any(f"{name}_mask" not in masks for name in told):
        return
    left = np.stack([mask.reshape(len(mask), -1).any(axis=1) for mask in masks.values()]).any(axis=0)
    if not left.all():
        what = " and ".join(map(repr, masks))
        raise InputError(f"all values of sample {np.argmin(left)} are masked by {what}", "leave a 1 in each sample")


def read_arrays(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]] | npt.NDArray[Any]:
    """The arrays of a .npz file by name, or the array of a .npy file. Raises InputError. Executes nothing in it."""
    name, ending = os.fspath(path), Path(path).suffix.lower()
    if ending == ".npy":
        return load_npy(path)
    if ending != ".npz":
        raise InputError(f"{name} is neither .npz nor .npy", "write the inputs with numpy.savez(file, name=array)")
    return read_npz(path)


def _converted(array: npt.NDArray[Any], spec: TensorSpec) -> Array:
    """The array in the graph's dtype. Raises InputError: a value would change."""
    if not isinstance(array, np.ndarray):
        raise InputError(f"{spec.name!r} is of type {type(array).__name__}", "give a numpy array")
    wanted = np.dtype(spec.dtype)
    if array.dtype == wanted:
        return array
    if array.dtype.kind not in ("f" if wanted.kind == "f" else "biu"):
        hint = f"use array.astype({str(wanted)!r})"
        raise InputError(f"{spec.name!r} has dtype {array.dtype}, but the model takes {wanted}", hint)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(wanted)
    lost = np.isinf(converted) & ~np.isinf(array) if wanted.kind == "f" else converted != array
    if lost.any():
        raise InputError(f"{spec.name!r} contains {array[lost][0]}, too large for {wanted}", "give smaller values")
    return converted


def _shapes(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in specs)
