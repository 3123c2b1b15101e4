# SPDX-License-Identifier: Apache-2.0
"""Bundles of text models whose graphs are functions of numpy, whole and split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.runtimes.manifest import Part, TensorSpec
from perceiver_export.runtimes.preprocessing import TextPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.text import FillMask, TextClassification
from perceiver_export.runtimes.tasks.tokenizers import VOCABULARY, ByteTokenizer, open_tokenizer
from tests.runtimes.models import NumpyEngine, T, manifest, opened

LENGTH, NUM_LATENTS, CHUNK = 40, 3, 4
SENTENCE = "Two bytes are missing."
MASKED = "Two bytes are mi[MASK*2]ing."
LABELS = ("short", "long", "shouting")
TASKS = {"cola": 2, "mnli": 3, "stsb": 1}
Size = int | tuple[int, int]
BATCHES: list[Size] = [1, 3, (1, 4), (2, 4)]


class Bundle:
    """A manifest, and an engine for each part; ``whole`` is the engine of all of them joined."""

    def __init__(self, task: str, parts: dict[str, NumpyEngine], special_tokens: bool, **fields: Any) -> None:
        self.parts = parts
        described = {
            name: Part(
                name,
                engine.inputs,
                engine.outputs,
                num_queries=LENGTH if any(one.name == "queries" for one in engine.inputs) else None,
            )
            for name, engine in parts.items()
            if name != "whole" or len(parts) == 1
        }
        outputs = parts["whole"].outputs if len(parts) > 1 else ()
        steps = fields.pop("preprocessing", TextPreprocessing(LENGTH, special_tokens))
        self.manifest = manifest(task, described, steps, outputs=outputs, **fields)

    def open(self, kind: type[T]) -> T:
        """The task, as `open_task` makes it."""
        return opened(kind, self.manifest, self.parts, open_tokenizer(self.manifest, Path()))

    def calls(self) -> dict[str, int]:
        return {name: len(engine.calls) for name, engine in self.parts.items() if engine.calls}


def spec(name: str, dtype: Any, batch: Size, *shape: int) -> TensorSpec:
    ranges = {} if isinstance(batch, int) else {"batch": batch}
    return TensorSpec(name, dtype, ("batch" if ranges else batch, *shape), ranges=ranges)  # type: ignore[arg-type]


def text_inputs(batch: Size) -> tuple[TensorSpec, ...]:
    return spec("tokens", "int32", batch, LENGTH), spec("tokens_mask", "int32", batch, LENGTH)


def expected_logits(special_tokens: bool) -> Array:
    """(LENGTH, VOCABULARY): at each position the token of SENTENCE there is the best, the next higher ones follow."""
    wanted = ByteTokenizer(LENGTH, special_tokens)([SENTENCE])["tokens"][0]
    logits: Array = -((np.arange(VOCABULARY)[None] - wanted[:, None]) % VOCABULARY).astype(np.float32)
    return logits


def read(feeds: Feeds) -> Array:
    """Latents (B, NUM_LATENTS, 1): the sum of the tokens that are there, / 1e6. The logits grow with it."""
    sums = (feeds["tokens"] * feeds["tokens_mask"]).sum(axis=1, dtype=np.float32) / np.float32(1e6)
    return np.repeat(sums[:, None, None], NUM_LATENTS, axis=1)


def language_model(split: bool, special_tokens: bool = True, batch: Size = 1) -> Bundle:
    """A model that has learned SENTENCE by heart; ``batch`` is fixed, or (least, most)."""
    table = expected_logits(special_tokens)
    inputs, outputs = text_inputs(batch), (spec("logits", "float32", batch, LENGTH, VOCABULARY),)
    latents = (spec("latents", "float32", batch, NUM_LATENTS, 1),)
    whole = NumpyEngine(lambda feeds: {"logits": table[None] * (1 + read(feeds)[:, :1])}, inputs, outputs)
    if not split:
        return Bundle("fill-mask", {"whole": whole}, special_tokens)
    parts = {
        "whole": whole,
        "encoder": NumpyEngine(lambda feeds: {"latents": read(feeds)}, inputs, latents),
        "decoder": NumpyEngine(
            lambda feeds: {"logits": table[feeds["queries"]] * (1 + feeds["latents"][:, :1])},
            (*latents, spec("queries", "int32", batch, CHUNK)),
            (spec("logits", "float32", batch, CHUNK, VOCABULARY),),
        ),
    }
    return Bundle("fill-mask", parts, special_tokens)


def scores(feeds: Feeds, classes: int) -> Array:
    """(B, classes): how many tokens there are, the largest, the first of the text; each / 10."""
    tokens = feeds["tokens"] * feeds["tokens_mask"]
    features = np.stack([feeds["tokens_mask"].sum(axis=1), tokens.max(axis=1), tokens[:, 1]], axis=1)
    return (features[:, :classes] / 10).astype(np.float32)


def classifier(split: bool, tasks: dict[str, int], batch: Size = 1, **manifest: Any) -> Bundle:
    """A model with an output for each of ``tasks``, which gives their numbers of classes."""
    inputs = text_inputs(batch)
    outputs = tuple(spec(name, "float32", batch, classes) for name, classes in tasks.items())
    whole = NumpyEngine(
        lambda feeds: {name: scores(feeds, classes) for name, classes in tasks.items()}, inputs, outputs
    )
    if not split:
        return Bundle("text-classification", {"whole": whole}, True, **manifest)
    latents = (spec("latents", "float32", batch, 2, LENGTH),)
    parts = {
        "whole": whole,
        "encoder": NumpyEngine(
            lambda feeds: {"latents": np.stack([feeds["tokens"], feeds["tokens_mask"]], axis=1).astype(np.float32)},
            inputs,
            latents,
        ),
    }
    for output in outputs:

        def decode(feeds: Feeds, output: TensorSpec = output) -> dict[str, Array]:
            tokens, mask = feeds["latents"][:, 0], feeds["latents"][:, 1]
            return {output.name: scores({"tokens": tokens, "tokens_mask": mask}, tasks[output.name])}

        parts[f"decoder_{output.name}" if len(outputs) > 1 else "decoder"] = NumpyEngine(decode, latents, (output,))
    return Bundle("text-classification", parts, True, **manifest)


def fill_mask(bundle: Bundle) -> FillMask:
    return bundle.open(FillMask)


def classification(bundle: Bundle) -> TextClassification:
    return bundle.open(TextClassification)
