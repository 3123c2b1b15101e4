# SPDX-License-Identifier: Apache-2.0
"""What `run --json` must say of each small model: its numbers, computed in torch without a bundle's graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from perceiver_export.exporter import LoadedModel
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks.flow import OpticalFlow

Array = npt.NDArray[Any]


def found_numbers(system: str, document: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the document that `run --json` printed, with `--top 999` where there are labels."""
    if system == "flow":
        (pair,) = document["pairs"]
        return {name: pair[name] for name in ("mean", "max", "mean_x", "mean_y")}
    if system == "sets":
        return {name: document["outputs"]["outputs"][name] for name in ("min", "mean", "max")}
    if system == "video":
        return {"labels": _by_index(document["labels"]), **document["psnr"]}
    if system == "language":
        (answer,) = document["answers"]
        return {
            str(blank["position"]): [
                one["probability"] for one in sorted(blank["candidates"], key=lambda one: one["token"])
            ]
            for blank in answer["blanks"]
        }
    if system == "glue":
        (answer,) = document["answers"]
        return dict(answer["scores"])
    return {answer["input"]: _by_index(answer["labels"]) for answer in document["answers"]}


def torch_numbers(system: str, model: LoadedModel, bundle: Path, inputs: list[str]) -> dict[str, Any]:
    """The same from torch; of the bundle only what comes before its graphs is used."""
    with open_task(bundle) as task:
        if system == "flow":
            return _flow(cast("OpticalFlow", task), model, inputs)
        if system == "sets":
            return _sets(model, inputs[0])
        if system == "video":
            return _video(task, model, inputs)
        if system == "language":
            logits = model.run(task.tokenizer([Path(inputs[0]).read_text(encoding="utf-8")]))["logits"][0]
            return {str(position): _softmax(logits[position]) for position in range(5, 9)}
        if system == "glue":
            return {name: scores[0] for name, scores in model.run(task.tokenizer(inputs)).items()}
        if system == "sentiment":
            return {inputs[0]: _softmax(model.run(task.tokenizer(inputs))["logits"][0])}
        if system == "pictures":
            files = sorted(Path(inputs[0]).iterdir())
            return {
                str(file): _softmax(model.run({"image": task.preprocess(file)[None]})["logits"][0]) for file in files
            }
        logits = model.run(task.preprocess(*inputs))["logits"][0]
        return {" + ".join(inputs): _softmax(logits) if system == "points" else 1 / (1 + np.exp(-logits))}


def _flow(task: OpticalFlow, model: LoadedModel, inputs: list[str]) -> dict[str, float]:
    """Tiles and stitching are the task's; the tests of the task compare them with DeepMind's."""
    flow = OpticalFlow(task.manifest, lambda _: SimpleNamespace(run=model.run))(*inputs)  # type: ignore[arg-type, return-value]
    x, y = flow[..., 0].astype(np.float64), flow[..., 1].astype(np.float64)
    lengths = np.sqrt(x**2 + y**2)
    return {"mean": lengths.mean(), "max": lengths.max(), "mean_x": x.mean(), "mean_y": y.mean()}


def _sets(model: LoadedModel, file: str) -> dict[str, float]:
    with np.load(file) as arrays:
        entities = arrays["entities"]
    padded = np.zeros((1, 12, 16), np.float32)
    padded[0, : len(entities)] = entities
    mask = (np.arange(12) < len(entities)).astype(np.int32)[None]
    outputs = model.run({"entities": padded, "entities_mask": mask})["outputs"][0, : len(entities)]
    return {"min": outputs.min(), "mean": outputs.mean(), "max": outputs.max()}


def _video(task: Any, model: LoadedModel, inputs: list[str]) -> dict[str, Any]:
    feeds = task.preprocess(*inputs)
    outputs = model.run(feeds)
    numbers: dict[str, Any] = {"labels": _softmax(outputs["label"][0])}
    for name, given, least in (("video", feeds["frames"], 0), ("sound", feeds["audio"], -1)):
        error = (outputs[name].clip(least, 1).astype(np.float64) - given) ** 2
        numbers[name] = -10 * np.log10(error.mean())
    return numbers


def _by_index(labels: list[dict[str, Any]]) -> list[float]:
    return [one["probability"] for one in sorted(labels, key=lambda one: one["index"])]


def _softmax(logits: Array) -> Array:
    probabilities: Array = torch.from_numpy(np.array(logits)).double().softmax(-1).numpy()
    return probabilities
