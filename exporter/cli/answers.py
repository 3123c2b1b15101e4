# SPDX-License-Identifier: Apache-2.0
"""Answers of `run`: code for all tasks, and the tasks that answer with labels, values or arrays.

A task has two functions, here or in `run_text` and `run_frames`. The first checks the request and reads its samples
before the model is loaded. The second runs the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_export.calibration.options import option
from perceiver_export.exporter.cli.output import Table, new_file, shape
from perceiver_export.runtimes.engines.backend import PrecisionChoice
from perceiver_export.runtimes.engines.backend import Progress as Progress
from perceiver_export.runtimes.errors import InputError, UsageError, printable
from perceiver_export.runtimes.files import readable

if TYPE_CHECKING:
    from perceiver_export.runtimes.manifest import OutputKind
    from perceiver_export.runtimes.runtime import Array, Runtime
    from perceiver_export.runtimes.tasks.base import Prediction

_SHOWN = 20  # samples of arrays
_NAMED = 5  # samples without an answer
_INDEPENDENT = "the labels are independent, and each has its own probability"


@dataclass(frozen=True)
class Request:
    """One call of `run`; fields with a doc are options of the command."""

    bundle: str = ""
    inputs: Sequence[str] = ()
    output: Path | None = option(
        None, "Where to write answers: a .json, image or array file, replaced if it exists; or a new directory."
    )
    top: int = 3
    device: str = option("auto", "Target to run on; `auto` prefers a certified target.")
    precision: PrecisionChoice | None = option(
        None,
        "Use the engine of this precision; `auto`: the fastest one certified here; by default the one built last.",
    )
    threads: int | None = option(None, "Threads of the engine; by default the engine chooses.")
    check_finite: bool = option(False, "Refuse NaN and infinity in inputs and outputs.")
    text: Sequence[str] = option(tuple, "A text, even if a file has that name. May be repeated.", "TEXT")
    truncate: bool = option(False, "Cut texts that are too long for the model instead of refusing them.")


@dataclass(frozen=True)
class Answers:
    """The model's answers: ``document`` for JSON, ``shown`` for the terminal, ``save`` to write other files.

    ``error``: raised in the end, because some of the samples have no answer.
    """

    runtime: Runtime
    document: Mapping[str, Any]
    shown: Sequence[Table | str]
    save: Callable[[Path], None] | None = None
    error: InputError | None = None


def described(answer: Sequence[Prediction]) -> tuple[dict[str, Any], dict[str, str]]:
    """An answer for JSON (``labels`` or ``values``), and its cells by header: ranks or names of values."""
    from perceiver_export.runtimes.tasks.base import Value

    values = [one for one in answer if isinstance(one, Value)]
    if values:
        document = [{"label": one.label, "index": one.index, "value": one.value} for one in values]
        return {"values": document}, {f"{printable(one.label)}>": f"{one.value:.6g}" for one in values}
    cells = {f"{rank}.": f"{printable(one.label)}  {one.probability:.1%}" for rank, one in enumerate(answer, 1)}
    return {"labels": answer}, cells


def label_table(
    what: str, names: Sequence[str], answers: Sequence[Sequence[Prediction]], kind: OutputKind | None, *notes: str
) -> Table:
    """A row for each sample: its name and its answer."""
    cells = [described(answer)[1] for answer in answers]
    rows = [(name, *one.values()) for name, one in zip(names, cells, strict=True)]
    independent = [_INDEPENDENT] if kind == "multi-label" else []
    return Table("", [what, *max(cells, key=len)], rows, "; ".join([*independent, *notes]))


def answer_each(what: str, task: Any, samples: Any, request: Request, progress: Progress) -> Answers:
    """Run the task on each sample in turn; a sample holds the arguments of the task's call, None if absent.

    Samples that the task refuses are left out and named in the error. If there is no other sample, it is raised here.
    """
    files, answers, refused = [], [], list[tuple[str, InputError]]()
    for done, sample in enumerate(samples):
        progress("run", done, len(samples))
        own = [readable(part) for part in sample if part is not None]
        try:
            answers.append(task(*sample, request.top))
            files.append(own)
        except InputError as error:
            refused.append((" + ".join(own), error.with_traceback(None)))  # which holds the sample
    if not answers:
        raise refused[0][1]
    documents = [{"input": " + ".join(name), **described(one)[0]} for name, one in zip(files, answers, strict=True)]
    short = short_names([path for sample in files for path in sample])
    names = [" + ".join(short[path] for path in sample) for sample in files]
    table = label_table(what, names, answers, task.kind)
    return Answers(task.runtime, {"answers": documents}, [table], error=_without_answer(refused, len(samples)))


def _without_answer(refused: Sequence[tuple[str, InputError]], samples: int) -> InputError | None:
    """The error that names the samples without an answer; None if there are none."""
    if not refused:
        return None
    said = [error.message if name in error.message else f"{name}: {error.message}" for name, error in refused]
    listed, hints = "; ".join(said[:_NAMED]) + "; …" * (len(said) > _NAMED), {error.hint for _, error in refused}
    hint = hints.pop() if len(hints) == 1 else "correct these inputs, or leave them out"
    return InputError(f"no answer for {len(refused)} of {samples} inputs: {listed}", hint)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """File names for a table: without folders, or if two files have the same name, without their common folder."""
    if len({os.path.basename(path) for path in paths}) == len({*paths}):
        return {path: os.path.basename(path) for path in paths}
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return {path: os.path.relpath(path, folder) for path in paths}


def image_files(request: Request) -> list[tuple[Path]]:
    """The files, and the images of the directories, in order."""
    from perceiver_export.runtimes.tasks.image_files import list_images

    return _files(request, list_images)


def point_files(request: Request) -> list[tuple[Path]]:
    """The files, and the point clouds of the directories, in order."""
    from perceiver_export.runtimes.tasks.image_files import list_files
    from perceiver_export.runtimes.tasks.points import POINT_FILES

    return _files(request, lambda directory: list_files(directory, POINT_FILES, "point clouds"))


def _files(request: Request, listed: Callable[[Path], list[Path]]) -> list[tuple[Path]]:
    return [(file,) for path in map(Path, request.inputs) for file in (listed(path) if path.is_dir() else [path])]


def answer_sounds(task: Any, inputs: Sequence[str], request: Request, progress: Progress) -> Answers:
    """Recordings (a spectrogram in .npy for a model that takes one), frames, or pairs AUDIO FRAMES."""
    samples: list[tuple[str | None, str | None]]
    samples = [(name, None) if task.hears else (None, name) for name in inputs]
    if task.hears and task.sees:
        if len(inputs) % 2:
            hint = "give each recording with the directory of its frames: run BUNDLE sound.wav frames/"
            raise UsageError(f"the model takes recordings and frames in pairs, but got {len(inputs)} inputs", hint)
        samples = list(zip(inputs[::2], inputs[1::2], strict=True))
    return answer_each("input", task, samples, request, progress)


def array_file(request: Request) -> str:
    """The one file IN.npz, or IN.npy for a model with one input."""
    if len(request.inputs) != 1:
        hint = "give one .npz file with all arrays: run BUNDLE in.npz"
        raise UsageError(f"inputs given: {len(request.inputs)}", hint)
    return request.inputs[0]


def answer_arrays(task: Any, file: str, request: Request, progress: Progress) -> Answers:
    """A summary of each output, and the answers of the one output that has labels or values."""
    import numpy as np

    from perceiver_export.runtimes.manifest import judged_output
    from perceiver_export.runtimes.tasks.base import answer

    outputs = _outputs(task, file)
    summaries = {name: _summary(array) for name, array in outputs.items()}
    rows = [
        (name, one["dtype"], shape(one["shape"]), *(f"{one[key]:.6g}" for key in ("min", "mean", "max")))
        for name, one in summaries.items()
    ]
    output = request.output
    note = "" if output is not None else "not written; -o out.npz writes them"
    shown = [Table("", ["output", "dtype", "shape", "min>", "mean>", "max>"], rows, note)]
    document: dict[str, Any] = {"outputs": summaries, "file": readable(output) if output is not None else None}
    name, kind = judged_output(task.manifest) or ("", None)
    if kind is not None and outputs[name].ndim in (1, 2):
        answers = [answer(row, kind, task.manifest.labels, request.top) for row in np.atleast_2d(outputs[name])]
        document["answers"] = [described(one)[0] for one in answers]
        more = len(answers) - _SHOWN
        notes = [f"{more:,} more samples: use --json"] if more > 0 else []
        names = list(map(str, range(len(answers))))[:_SHOWN]
        table = label_table("sample>", names, answers[:_SHOWN], kind, *notes)
        shown.append(table._replace(title=f"answers of {name}"))
    return Answers(task.runtime, document, shown, lambda path: _write(path, outputs))


def _outputs(task: Any, file: str) -> dict[str, Array]:
    from perceiver_export.runtimes.tasks.arrays import Arrays, read_arrays

    arrays = read_arrays(file)
    if isinstance(task, Arrays):
        return task(arrays)
    if not isinstance(arrays, dict):
        return {"outputs": task(arrays)}
    if not {"entities"} <= arrays.keys() <= {"entities", "entities_mask"}:
        found = ", ".join(map(repr, arrays)) or "nothing"
        raise InputError(f"{file} holds {found}", "give `entities`, and `entities_mask` if needed")
    return {"outputs": task(arrays["entities"], arrays.get("entities_mask"))}


def _summary(array: Array) -> dict[str, Any]:
    import numpy as np

    values = {"min": array.min(), "mean": array.mean(dtype=np.float64), "max": array.max()}
    return {"dtype": str(array.dtype), "shape": list(array.shape), **{key: float(v) for key, v in values.items()}}


def _write(path: Path, outputs: Mapping[str, Array]) -> None:
    from perceiver_export.runtimes.npz import write_npz

    with new_file(path) as temporary:
        write_npz(temporary, outputs)
