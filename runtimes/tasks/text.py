# SPDX-License-Identifier: Apache-2.0
"""Fill in the masked tokens of a text; classify texts, or score them for several tasks in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.manifest import Manifest, OutputKind, judged_output
from perceiver_export.runtimes.runtime import pad_batch
from perceiver_export.runtimes.split import decode as decode_queries
from perceiver_export.runtimes.tasks import base
from perceiver_export.runtimes.tasks.base import LoadPart, Prediction, TextTask
from perceiver_export.runtimes.tasks.tokenizers import Tokenizer, Tokens, text_steps


@dataclass(frozen=True)
class Candidate:
    """A candidate for a masked position: the token, its readable form, and its probability among all tokens."""

    token: int
    symbol: str
    probability: float


@dataclass(frozen=True)
class Blank:
    """A masked position, counted in tokens (a leading [CLS] is 0), and its candidates, most probable first."""

    position: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Filled:
    """The text with every mask replaced by its most probable token, and the candidates for each mask.

    Bytes that are not valid UTF-8 together become U+FFFD. If a special token is the most probable, a byte tokenizer
    writes its name, because no candidate is excluded, as in transformers' example; a tokenizer.json omits it.
    """

    text: str
    blanks: tuple[Blank, ...]


class FillMask(TextTask):
    """``fill("This is [MASK*7].")`` -> `Filled`. One run fills all masked tokens, independently of one another.

    ``fill.tokenizer.mask_text`` is the mask of the model's tokenizer.
    """

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a masked language model."""
        steps = text_steps(manifest)
        if steps.tokenizer and not steps.tokenizer.mask:
            raise base.misfit("the bundle's tokenizer has no mask token")
        length = steps.length
        inputs = {"tokens": (length,), "tokens_mask": (length,)}
        base.check_interface(manifest, inputs, {"logits": (length, None)})
        if "encoder" in manifest.parts:
            decoder = manifest.parts.get("decoder")
            if decoder is None or decoder.num_queries != length:
                raise base.misfit(f"the encoder has no decoder for {length} positions")

    def __call__(self, text: str | bytes, top: int = 5) -> Filled:
        """Fill the masks of a text, with ``top`` candidates each.

        Raises InputError: no mask in the text, and what `Tokenizer.encode` raises; UsageError: top below 1.
        """
        base.check_top(top)
        tokens = self.tokenizer.encode(text)
        positions = np.flatnonzero(tokens == self.tokenizer.mask)
        if not len(positions):
            raise InputError(f"the text has no {self.tokenizer.mask_text}", self.tokenizer.mask_hint)
        probabilities = base.softmax(self._logits(tokens, positions))
        blanks = []
        for position, row in zip(positions.tolist(), probabilities, strict=True):
            best = np.argsort(-row, kind="stable")[:top].tolist()
            found = tuple(Candidate(token, self.tokenizer.symbol(token), float(row[token])) for token in best)
            blanks.append(Blank(position, found))
        filled = tokens.copy()
        filled[positions] = [blank.candidates[0].token for blank in blanks]
        return Filled(self.tokenizer.text(filled), tuple(blanks))

    def logits(self, text: str | bytes, positions: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Logits (n, vocabulary) at any n positions, counted in tokens, masked or not.

        Positions after the text are allowed, but the model has not been trained on them.

        Raises InputError: a position out of range, no positions, and what `Tokenizer.encode` raises.
        """
        rows, length = np.asarray(positions), self.tokenizer.length
        if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu":
            raise InputError(f"the positions are {rows.dtype} {list(rows.shape)}", "give one or more integers (n,)")
        wrong = rows[(rows < 0) | (rows >= length)]
        if len(wrong):
            raise InputError(f"position {wrong[0]} is out of range", f"give positions from 0 to {length - 1}")
        return self._logits(self.tokenizer.encode(text), rows)

    def _logits(self, tokens: Tokens, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        model = self.part("encoder") if self.split else self.runtime
        outputs = model.run(pad_batch(model, self.tokenizer.pad([tokens])))
        if self.split:
            rows = decode_queries(self.part("decoder"), {"latents": outputs["latents"]}, positions)
        else:
            rows = outputs["logits"][:, positions]
        return np.asarray(rows[0])


Scores = npt.NDArray[np.float32]
Answer = list[Prediction] | dict[str, Scores]


class TextClassification(TextTask):
    """``classify(text)`` -> the most probable labels, or the values of a regression model.

    A bundle of several tasks has one output per task: ``classify(text)`` returns ``{task: scores}``, the model's raw
    outputs (classes,), and ``classify.task(text, name)`` returns one of them. The bundle does not record what their
    classes mean. Write a pair of texts as ``first[SEP]second`` if the model's tokenizer has that token.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart, tokenizer: Tokenizer) -> None:
        super().__init__(manifest, load_part, tokenizer)
        self.labels = manifest.labels
        self._answering = _answering(manifest)
        self.kind: OutputKind = self._answering[1] if self._answering else "none"
        self.tasks = () if self._answering else tuple(spec.name for spec in base.interface(manifest)[1])

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a text classifier."""
        length = text_steps(manifest).length
        outputs = tuple(spec.name for spec in base.interface(manifest)[1])
        inputs = {"tokens": (length,), "tokens_mask": (length,)}
        base.check_interface(manifest, inputs, dict.fromkeys(outputs, (None,)))
        _answering(manifest)
        missing = {_decoder(manifest, name) for name in outputs} - manifest.parts.keys()
        if "encoder" in manifest.parts and missing:
            raise base.misfit(f"the bundle has no part {min(missing)}")

    def __call__(self, text: str | bytes, top: int = 5) -> Answer:
        """The ``top`` labels, most probable first, or all values; with several tasks, the scores by task.

        Raises InputError: what `Tokenizer.encode` raises; UsageError: top below 1.
        """
        return self.batch([text], top)[0]

    def batch(self, texts: str | bytes | Sequence[str | bytes], top: int = 5) -> list[Answer]:
        """The answer for each text, run in batches of the bundle's batch size. Raises as a call does."""
        base.check_top(top)
        given = base.as_list(texts, "texts", _is_text)
        outputs = self.outputs(given)
        if self._answering is not None:
            name, kind = self._answering
            return [base.answer(row, kind, self.labels, top) for row in outputs[name]]
        return [{name: scores[row] for name, scores in outputs.items()} for row in range(len(given))]

    def outputs(self, texts: str | bytes | Sequence[str | bytes]) -> dict[str, Scores]:
        """The model's outputs (len(texts), classes) by name."""
        return base.run_batched(self.runtime, self.tokenizer(base.as_list(texts, "texts", _is_text)))

    def task(self, text: str | bytes, name: str) -> Scores:
        """One task's scores (classes,). In a split bundle only the encoder and that task's decoder run.

        Raises UsageError: no such task; InputError: what `Tokenizer.encode` raises.
        """
        if name not in self.tasks:
            known = f"use one of {', '.join(self.tasks)}" if self.tasks else "call it without a task: it has only one"
            raise UsageError(f"the bundle has no task {name!r}", known)
        feeds = self.tokenizer([text])
        if self.split:
            latents = base.run_batched(self.part("encoder"), feeds)["latents"]
            decoded = base.run_batched(self.part(_decoder(self.manifest, name)), {"latents": latents})
        else:
            decoded = base.run_batched(self.runtime, feeds)
        return np.asarray(decoded[name][0])


def _is_text(given: object) -> bool:
    return isinstance(given, (str, bytes))


def _answering(manifest: Manifest) -> tuple[str, OutputKind] | None:
    """The output of labels or values; None for a bundle of several tasks. Raises BundleError: a mismatch of labels."""
    one = judged_output(manifest) is not None and len(base.interface(manifest)[1]) == 1
    return base.answering(manifest) if one or manifest.labels else None


def _decoder(manifest: Manifest, output: str) -> str:
    """The part of a split bundle that computes this output."""
    found = (name for name, part in manifest.parts.items() if output in [spec.name for spec in part.outputs])
    return next(found, f"decoder_{output}")
