# SPDX-License-Identifier: Apache-2.0
"""Texts in, labels out; or the scores of several tasks from one reading of the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.byte_tokenizer import ByteTokenizer
from perceiver_export.runtimes.errors import BundleError, UsageError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.tasks.base import LoadPart, Task
from perceiver_export.runtimes.tasks.graphs import as_list, check_interface, check_labels, interface, run_batched
from perceiver_export.runtimes.tasks.prediction import Prediction, softmax
from perceiver_export.runtimes.tasks.ranking import check_top, rank

Scores = npt.NDArray[np.float32]
Answer = list[Prediction] | dict[str, Scores]


class TextClassification(Task):
    """``classify(text)`` -> the most probable labels.

    A bundle of several tasks has no labels and an output for each task: ``classify(text)`` gives ``{task: scores}``,
    the model's raw outputs (classes,), for only the task's owner knows what they mean; ``classify.task(text, name)``
    gives one of them. A pair of texts is written ``first[SEP]second`` where the model has special tokens.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        self.labels = manifest.labels
        self.tasks = () if self.labels else tuple(spec.name for spec in interface(manifest)[1])
        self.tokenizer = ByteTokenizer.from_manifest(manifest)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a classifier of texts."""
        length = ByteTokenizer.from_manifest(manifest).length
        outputs = ("logits",) if manifest.labels else tuple(spec.name for spec in interface(manifest)[1])
        inputs = {"tokens": (length,), "tokens_mask": (length,)}
        check_interface(manifest, inputs, dict.fromkeys(outputs, (None,)))
        if manifest.labels:
            check_labels(manifest, "logits")
        missing = {_decoder(manifest, name) for name in outputs} - manifest.parts.keys()
        if "encoder" in manifest.parts and missing:
            raise BundleError(f"the bundle has no part {min(missing)}", "export the bundle again")

    def __call__(self, text: str | bytes, top: int = 5) -> Answer:
        """The ``top`` labels, most probable first; of several tasks the scores by task.

        Raises InputError: what `ByteTokenizer.encode` raises; UsageError: top below 1.
        """
        return self.batch([text], top)[0]

    def batch(self, texts: Sequence[str | bytes], top: int = 5) -> list[Answer]:
        """The answer to each text, run in the batches that the bundle was exported for. Raises what a call raises."""
        check_top(top)
        given = as_list(texts, "texts")
        outputs = self.outputs(given)
        if self.labels:
            return [rank(row, self.labels, top) for row in softmax(outputs["logits"])]
        return [{name: scores[row] for name, scores in outputs.items()} for row in range(len(given))]

    def outputs(self, texts: Sequence[str | bytes]) -> dict[str, Scores]:
        """The model's outputs (len(texts), classes) by name: ``logits``, or an output for each task."""
        return run_batched(self.runtime, self.tokenizer(as_list(texts, "texts")))

    def task(self, text: str | bytes, name: str) -> Scores:
        """One task's scores (classes,). Of a split bundle only the encoder and that task's decoder run.

        Raises UsageError: no such task; InputError: what `ByteTokenizer.encode` raises.
        """
        if name not in self.tasks:
            known = ", ".join(self.tasks) or "none: it has one task, and labels"
            raise UsageError(f"the bundle has no task {name!r}", f"its tasks: {known}")
        feeds = self.tokenizer([text])
        if self.split:
            latents = run_batched(self.part("encoder"), feeds)["latents"]
            decoded = run_batched(self.part(_decoder(self.manifest, name)), {"latents": latents})
        else:
            decoded = run_batched(self.runtime, feeds)
        scores: Scores = decoded[name][0]
        return scores


def _decoder(manifest: Manifest, output: str) -> str:
    """The part of a split bundle that gives this output."""
    return f"decoder_{output}" if len(manifest.outputs) > 1 else "decoder"
