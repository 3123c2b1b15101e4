# SPDX-License-Identifier: Apache-2.0
"""Metrics of classifiers and masked language models.

Equal accuracy hides answers that flip (arXiv 2407.09141), so agreement with the reference and the divergence of
probabilities (KL) are reported too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perceiver_export.calibration.validation.metrics.base import Column, Columns, Family, Metric, Outputs
from perceiver_export.runtimes.runtime import Array

_TOP = 5
_AGREEMENT = Metric("agreement", "likeness", "higher", "share", "%")
_KL = Metric("kl", "likeness", "lower", "mean", "nats")


def name_of(index: int, names: Sequence[str]) -> str:
    """A label's name, or its index if it has none."""
    return names[index] if index < len(names) else str(index)


def log_softmax(logits: Array) -> Array:
    """Logarithms of probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(expected: Array, found: Array) -> Array:
    """Kullback-Leibler divergence along the last axis of two arrays of logarithms of probabilities, in nats."""
    # Rounding makes it slightly negative where both are equal.
    return np.asarray(np.maximum((np.exp(expected) * (expected - found)).sum(axis=-1), 0.0))


def kl(reference: Array, found: Array) -> Array:
    """Kullback-Leibler divergence KL(reference ‖ found) of two arrays of logits along the last axis, in nats."""
    return divergence(log_softmax(reference), log_softmax(found))


def distribution(logs: Array) -> dict[str, Array]:
    """A summary of distributions (n, ...), given as logarithms of probabilities, for `from_mean`.

    Terms are rounded to multiples of 2⁻³², whose sums are exact, so that their order does not matter.
    """
    shares, axes = np.exp(logs), tuple(range(1, logs.ndim))
    terms = {"probabilities": shares, "negentropy": (shares * logs).sum(axis=axes)}
    sums = {name: (np.rint(np.ldexp(term, 32)) * 2.0**-32).sum(axis=0) for name, term in terms.items()}
    return {"rows": np.array(len(logs)), **sums}


def from_mean(seen: Mapping[str, Any]) -> float:
    """The mean of KL(each distribution ‖ their mean), in nats."""
    mean = seen["probabilities"] / seen["rows"]
    return max(0.0, float(seen["negentropy"] / seen["rows"] - (mean * np.log(mean + 1e-300)).sum()))


class SingleLabel(Family):
    """Logits (n, labels) of labels that exclude each other; ``targets["label"]``: indices (n,)."""

    metrics: tuple[Metric, ...] = (
        Metric("top-1", "quality", "higher", "share", "%"),
        Metric("top-5", "quality", "higher", "share", "%"),
        _AGREEMENT,
        _KL,
    )
    targets: tuple[str, ...] | None = ("label",)
    telling: tuple[str, ...] = ("top-1",)

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """Top-1, and top-5 if there are more than five labels. Ties go to the lower index."""
        logits, labels = self.scores(outputs), targets["label"][:, None]
        order = np.argsort(-logits, axis=1, kind="stable")
        tops = {"top-1": 1, "top-5": _TOP} if logits.shape[1] > _TOP else {"top-1": 1}
        return {name: Column.of((order[:, :count] == labels).any(axis=1)) for name, count in tops.items()}

    def judged(self, outputs: Outputs, targets: Outputs) -> tuple[Array, Array]:
        """Logits (n, positions, labels), and which positions are judged (n, positions)."""
        logits = self.scores(outputs)[:, None]
        return logits, np.ones(logits.shape[:2], bool)

    def likeness(self, outputs: Outputs, reference: Outputs, targets: Outputs) -> Columns:
        """Whether the first label is the same, and KL(reference ‖ candidate)."""
        (found, judged), (expected, _) = (self.judged(side, targets) for side in (outputs, reference))
        moved = np.zeros(judged.shape)
        moved[judged] = kl(expected[judged], found[judged])
        same = found.argmax(axis=-1) == expected.argmax(axis=-1)
        return {"agreement": Column.mean(same, judged), "kl": Column.mean(moved, judged)}

    def seen(self, outputs: Outputs, targets: Outputs) -> dict[str, Array]:
        """Counts of answers and of true labels, and the distributions."""
        logits, judged = self.judged(outputs, targets)
        rows, (name,) = logits[judged], self.targets or ("",)
        true = targets[name].reshape(judged.shape)[judged] if name in targets else np.zeros(0, int)
        counts = {"answers": rows.argmax(axis=-1), "true": true}
        found = {name: np.bincount(some, minlength=logits.shape[-1]) for name, some in counts.items()}
        return found | distribution(log_softmax(rows))

    def naive(self, seen: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, float]]:
        """Always the most frequent label; for perplexity, with the probabilities of all labels in the data."""
        answers, true = seen["answers"], seen["true"]
        if not answers.any():
            return self.says, {}
        values = {"agreement": float(answers.max() / answers.sum()), "kl": from_mean(seen)}
        if true.any():
            shares = np.sort(true / true.sum())[::-1]
            logs = np.log(shares[shares > 0])
            values |= dict.fromkeys(("top-1", "token accuracy"), float(shares[0]))
            values |= {"top-5": float(shares[:_TOP].sum()), "perplexity": float(np.exp(-shares[: len(logs)] @ logs))}
        return f"always answering {name_of(int((true if true.any() else answers).argmax()), names)!r}", values

    def answers(self, outputs: Outputs) -> Array:
        """Index of the first label (n,)."""
        return np.asarray(self.scores(outputs).argmax(axis=1))

    def text(self, answer: Array, names: Sequence[str]) -> str:
        """The label's name."""
        return name_of(int(answer), names)


class Text(SingleLabel):
    """Logits (n, length, vocabulary); ``targets["tokens"]`` (n, length): the token under each mask, -1 elsewhere.

    A text is the sample, because its positions are not independent: its value is the mean over its masked positions,
    its weight their number.
    """

    metrics = (
        Metric("token accuracy", "quality", "higher", "fraction", "%"),
        Metric("perplexity", "quality", "lower", "exp", "a token"),
        Metric("agreement", "likeness", "higher", "fraction", "%"),
        _KL,
    )
    targets = ("tokens",)
    telling = ("token accuracy",)
    output = "logits"  # `FillMask.check` requires it

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """How often the token is right, and how surprised the model is by it."""
        (logits, masked), tokens = self.judged(outputs, targets), targets["tokens"]
        surprise = np.zeros(tokens.shape)
        surprise[masked] = -np.take_along_axis(log_softmax(logits[masked]), tokens[masked][:, None], axis=1)[:, 0]
        right = logits.argmax(axis=-1) == tokens
        return {"token accuracy": Column.mean(right, masked), "perplexity": Column.mean(surprise, masked)}

    def judged(self, outputs: Outputs, targets: Outputs) -> tuple[Array, Array]:
        """Logits, and the masked positions: only those are judged."""
        return outputs["logits"], targets["tokens"] >= 0

    def answers(self, outputs: Outputs) -> Any:
        """None, because people cannot read token indices."""
        return None


_DRAWS = 256  # at a time: their weights stay in a cache


def macro_f1(values: Array, counts: Array) -> Array:
    """``values`` (n, 2, labels): twice the true positives; predicted labels plus true labels."""
    sums = (counts.astype(np.float64) @ values.reshape(len(values), -1)).reshape(*counts.shape[:-1], *values.shape[1:])
    return np.asarray((sums[..., 0, :] / np.maximum(sums[..., 1, :], 1e-12)).mean(axis=-1))


def mean_average_precision(values: Array, counts: Array) -> Array:
    """``values`` (n, 2, labels): scores and truths. Equal scores enter together; absent labels do not count."""
    drawn = counts.reshape(-1, len(values))
    blocks = (drawn[start : start + _DRAWS] for start in range(0, len(drawn), _DRAWS))
    found = np.concatenate([_precisions(values, block.T.astype(np.float32)) for block in blocks])
    return found.reshape(counts.shape[:-1])


def _precisions(values: Array, drawn: Array) -> Array:
    """`mean_average_precision` for draws (n, draws), a layout that caches well."""
    total, labels = np.zeros(drawn.shape[1]), np.zeros(drawn.shape[1])
    for scores, truth in zip(*np.moveaxis(values, 0, -1), strict=True):
        order = np.argsort(-scores, kind="stable")
        held = np.flatnonzero(truth[order])
        if not len(held):
            continue
        weights = drawn[order]
        # Each true sample's precision is that of all samples with at least its score: up to the end of its group.
        ends = np.searchsorted(-scores[order], -scores[order][held], side="right")
        right = np.cumsum(weights[held], axis=0)
        taken = np.cumsum(weights, axis=0)[ends - 1]
        precision = right[np.searchsorted(held, ends) - 1] / np.maximum(taken, 1)
        total += (weights[held] * precision).sum(axis=0) / np.maximum(right[-1], 1)
        labels += right[-1] > 0
    return np.asarray(total / np.maximum(labels, 1))


class MultiLabel(Family):
    """Logits (n, labels) of labels that may hold together; one is predicted if its probability is above 0.5.

    ``targets["label"]`` is (n, labels): 1 where a label is true. Definitions are scikit-learn's: subset accuracy (all
    labels of a sample right), label accuracy (one minus the Hamming loss), F1 over all decisions (micro), its mean over
    labels (macro; 0 for a label that neither occurs nor is predicted), and the mean average precision over the
    labels that occur.
    """

    metrics = (
        Metric("subset accuracy", "quality", "higher", "share", "%"),
        Metric("label accuracy", "quality", "higher", "fraction", "%"),
        Metric("micro-f1", "quality", "higher"),
        Metric("macro-f1", "quality", "higher", "statistic", "", macro_f1),
        Metric("map", "quality", "higher", "statistic", "", mean_average_precision),
        _AGREEMENT,
        _KL,
    )
    targets = ("label",)
    # With many labels even a good model is seldom right about all of them, but its F1 beats the naive model's.
    telling = ("subset accuracy", "micro-f1")

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """Columns of all quality metrics."""
        scores, truths = self.scores(outputs), targets["label"] > 0.5
        said = scores > 0
        twice, whole = 2.0 * (said & truths), said.astype(np.float64) + truths
        both = whole.sum(axis=1)
        return {
            "subset accuracy": Column.of((said == truths).all(axis=1)),
            "label accuracy": Column.of((said == truths).mean(axis=1)),
            # The weights make the mean over samples F1 over all decisions.
            "micro-f1": Column.of(twice.sum(axis=1) / np.maximum(both, 1), both),
            "macro-f1": Column.of(np.stack([twice, whole], axis=1)),
            "map": Column.of(np.stack([scores, truths], axis=1)),
        }

    def likeness(self, outputs: Outputs, reference: Outputs, targets: Outputs) -> Columns:
        """Whether both predict the same labels, and the mean over labels of KL(reference ‖ candidate)."""
        found, expected = self.scores(outputs), self.scores(reference)
        moved = divergence(_yes_and_no(expected), _yes_and_no(found)).mean(axis=1)
        return {"agreement": Column.of(((found > 0) == (expected > 0)).all(axis=1)), "kl": Column.of(moved)}

    def seen(self, outputs: Outputs, targets: Outputs) -> dict[str, Column | Array]:
        """Hashes of each sample's predicted and true labels; counts of true labels, and the distributions."""
        found: dict[str, Column | Array] = {"said": _hashes(self.answers(outputs))}
        if "label" in targets:
            found |= {"sets": _hashes(targets["label"] > 0.5), "true": targets["label"].sum(axis=0, dtype=np.float64)}
        return found | distribution(_yes_and_no(self.scores(outputs)))

    def naive(self, seen: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, float]]:
        """Always the set of labels that is best for the metric."""
        rows = int(seen["rows"])
        found = {"kl": from_mean(seen) / len(seen["probabilities"]), "agreement": _most_frequent(seen["said"]) / rows}
        if "sets" in seen:
            shares = np.sort(seen["true"] / rows)[::-1]
            said = np.arange(1, len(shares) + 1)
            found |= {
                "subset accuracy": _most_frequent(seen["sets"]) / rows,
                "label accuracy": float(np.maximum(shares, 1 - shares).mean()),
                "micro-f1": float((2 * np.cumsum(shares) / (said + shares.sum())).max()),
                "macro-f1": float((2 * shares / (1 + shares)).mean()),
                "map": float(shares.sum() / max((shares > 0).sum(), 1)),
            }
        return "always answering the same labels", found

    def answers(self, outputs: Outputs) -> Array:
        """Which labels are predicted (n, labels)."""
        return np.asarray(self.scores(outputs) > 0)

    def text(self, answer: Array, names: Sequence[str]) -> str:
        """The labels, separated by commas."""
        return ", ".join(name_of(index, names) for index in np.flatnonzero(answer).tolist()) or "none"


def _hashes(rows: Array) -> Column:
    """48 bits for each row of booleans."""
    digests = (hashlib.blake2b(row.tobytes(), digest_size=6).digest() for row in rows)
    return Column.of(np.array([int.from_bytes(digest, "big") for digest in digests], np.float64))


def _most_frequent(column: Column) -> int:
    """How often the most frequent value occurs."""
    return int(np.unique(column.values, return_counts=True)[1].max())


def _yes_and_no(scores: Array) -> Array:
    """Logarithms of the probability that each label holds and that it does not (n, labels, 2)."""
    return -np.logaddexp(0, np.stack([-scores, scores], axis=-1, dtype=np.float64))
