# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` with models of your own, and of sets: arrays in, arrays out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_export.exporter.cli.answers import title
from perceiver_export.exporter.cli.files import check_file, new_file, text
from perceiver_export.exporter.cli.output import print_json, print_table, shape
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import InputError, UsageError

if TYPE_CHECKING:
    from perceiver_export.runtimes.runtime import Array
    from perceiver_export.runtimes.tasks.arrays import Arrays, Sets


def run(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """IN.npz with an array an input (IN.npy for a model with one input): a table of the outputs, or -o OUT.npz."""
    from perceiver_export.runtimes.tasks.arrays import Arrays, Sets

    if len(inputs) != 1:
        raise UsageError(f"inputs given: {len(inputs)}", "give one .npz file with all arrays: run BUNDLE in.npz")
    if output is not None:
        check_file(output)
        if output.suffix.lower() != ".npz":
            raise UsageError(f"{output} does not end in .npz", "give -o a file that does: -o out.npz")
    with options.open_task(bundle) as task:
        assert isinstance(task, (Arrays, Sets))  # `run` chose by the manifest's task
        outputs = _outputs(task, inputs[0])
        where = task.runtime.describe()
    if output is not None:
        _write(output, outputs)
    summaries = {name: _summary(array) for name, array in outputs.items()}
    if options.json:
        print_json({"runtime": where, "outputs": summaries, "file": text(output) if output is not None else None})
        return
    rows = [
        (name, one["dtype"], shape(one["shape"]), *(f"{one[key]:.6g}" for key in ("min", "mean", "max")))
        for name, one in summaries.items()
    ]
    note = f"written: {output}" if output is not None else "not written; -o out.npz writes them"
    print_table(title(bundle, where), ["output", "dtype", "shape", "min>", "mean>", "max>"], rows, note)


def _outputs(task: Arrays | Sets, file: str) -> dict[str, Array]:
    from perceiver_export.runtimes.tasks.arrays import Arrays, read_arrays

    arrays = read_arrays(file)
    if isinstance(task, Arrays):
        return task(arrays)
    if not isinstance(arrays, dict):
        return {"outputs": task(arrays)}
    if not {"entities"} <= arrays.keys() <= {"entities", "entities_mask"}:
        raise InputError(
            f"{file} holds {', '.join(map(repr, arrays)) or 'nothing'}",
            "give `entities`, and `entities_mask` if needed",
        )
    return {"outputs": task(arrays["entities"], arrays.get("entities_mask"))}


def _summary(array: Array) -> dict[str, Any]:
    import numpy as np

    values = {"min": array.min(), "mean": array.mean(dtype=np.float64), "max": array.max()}
    return {"dtype": str(array.dtype), "shape": list(array.shape), **{key: float(v) for key, v in values.items()}}


def _write(path: Path, outputs: dict[str, Array]) -> None:
    import zipfile

    import numpy as np

    # `numpy.savez` would take an output called `file` or `allow_pickle` for one of its own parameters.
    with new_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
