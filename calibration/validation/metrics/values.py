# SPDX-License-Identifier: Apache-2.0
"""Metrics of numbers: regression, arrays of any meaning, optical flow, reconstructed video and sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perceiver_export.calibration.validation.metrics.base import Column, Columns, Family, Metric, Outputs
from perceiver_export.runtimes.errors import require
from perceiver_export.runtimes.runtime import Array

_NOTHING = 1e-20  # of the mean square: the variance of equal numbers after rounding


def r2(values: Array, counts: Array) -> Array:
    """Coefficient of determination of (n, 2, k), found and true: the mean over k values, 0 if all truths are equal.

    As scikit-learn's ``uniform_average``.
    """
    weights = counts / counts.sum(axis=-1, keepdims=True)
    true = values[:, 1] - values[:, 1].mean(axis=0)  # centered, so that sums of squares keep their digits
    spread = weights @ np.square(true) - np.square(weights @ true)
    spread = np.where(spread > _NOTHING * np.square(values[:, 1]).mean(axis=0), spread, np.inf)
    shown: Array = np.where(np.isinf(spread), 0, 1 - weights @ np.square(values[:, 0] - values[:, 1]) / spread)
    return np.asarray(shown.mean(axis=-1))


def pearson(values: Array, counts: Array) -> Array:
    """Correlation of (n, 2, k), found and true: the mean over k values, 0 if one side is constant."""
    return _correlation(values, counts, lambda side, weights: side)


def spearman(values: Array, counts: Array) -> Array:
    """The correlation of ranks among the samples that count; ties have their middle rank."""
    return _correlation(values, counts, _ranks)


def _correlation(values: Array, counts: Array, numbers: Callable[[Array, Array], Array]) -> Array:
    """The mean over k of the correlations of (n, 2, k); ``numbers`` gives what to correlate, such as a side's ranks."""
    weights = counts.reshape(-1, len(values)) / counts.reshape(-1, len(values)).sum(axis=1, keepdims=True)

    def standard(side: Array) -> tuple[Array, Array]:
        """The side, centered and scaled to its size, and its variance."""
        side = numbers(side, counts.reshape(-1, len(values)).astype(np.float64))
        side = (side - side.mean()) / max(float(np.sqrt(np.square(side).mean())), 1e-300)
        side = side - (weights * side).sum(axis=1, keepdims=True)
        return side, (weights * np.square(side)).sum(axis=1)

    found = []
    for pair in np.moveaxis(values, -1, 0):
        (one, first), (other, second) = map(standard, pair.T)
        known = np.minimum(first, second) > _NOTHING
        found.append(
            np.where(known, (weights * one * other).sum(axis=1) / np.sqrt(np.where(known, first * second, 1)), 0)
        )
    return np.asarray(np.mean(found, axis=0)).reshape(counts.shape[:-1])


def _ranks(values: Array, weights: Array) -> Array:
    """Middle ranks (draws, n) of values (n,) that count ``weights`` (draws, n) times."""
    order = np.argsort(values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)
    groups = np.append(0, np.cumsum(last)[:-1])
    upto = np.cumsum(weights[:, order], axis=1)[:, last]
    ranks = np.empty_like(weights)
    ranks[:, order] = ((np.pad(upto[:, :-1], ((0, 0), (1, 0))) + upto + 1) / 2)[:, groups]
    return ranks


class Regression(Family):
    """Values (n, k); ``targets["label"]`` (n, k): the true ones."""

    metrics = (
        Metric("mae", "quality", "lower"),
        Metric("rmse", "quality", "lower", "root"),
        Metric("r2", "quality", "higher", "statistic", "", r2),
        Metric("pearson", "quality", "higher", "statistic", "", pearson),
        Metric("spearman", "quality", "higher", "statistic", "", spearman),
        Metric("distance", "likeness", "lower"),
        Metric("error", "likeness", "lower", "root", "%"),
    )
    targets = ("label",)
    telling = ("r2",)

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """Columns of all quality metrics."""
        found = self.answers(outputs)
        true = targets["label"].reshape(found.shape).astype(np.float64)
        both = Column.of(np.stack([found, true], axis=1))
        errors = {"mae": np.abs(found - true), "rmse": np.square(found - true)}
        means = {name: Column.of(error.mean(axis=1)) for name, error in errors.items()}
        return means | dict.fromkeys(("r2", "pearson", "spearman"), both)

    def likeness(self, outputs: Outputs, reference: Outputs, targets: Outputs) -> Columns:
        """The mean distance, and the error as a share of the reference's size over all samples, as one may be 0."""
        found, expected = self.answers(outputs), self.answers(reference)
        size = np.maximum(np.square(expected).mean(axis=1), 1e-30)
        return {
            "distance": Column.of(np.abs(found - expected).mean(axis=1)),
            "error": Column.of(np.square(found - expected).mean(axis=1) / size, size),
        }

    def seen(self, outputs: Outputs, targets: Outputs) -> Columns:
        """The values themselves."""
        true = {"true": Column.of(targets["label"])} if "label" in targets else {}
        return {"found": Column.of(self.answers(outputs)), **true}

    def naive(self, seen: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, float]]:
        """Always the mean."""
        found, said = seen["found"].values, dict[str, float]()
        said["distance"], error = _from_mean(found)
        said["error"] = error / max(float(np.sqrt(np.square(found).mean())), 1e-30)
        if "true" in seen:
            said |= {"r2": 0.0, "pearson": 0.0, "spearman": 0.0}
            said["mae"], said["rmse"] = _from_mean(seen["true"].values)
        return "always answering the mean", said

    def answers(self, outputs: Outputs) -> Array:
        """The values (n, k)."""
        return self.scores(outputs).astype(np.float64)

    def text(self, answer: Array, names: Sequence[str]) -> str:
        """The values, separated by commas."""
        return ", ".join(f"{value:.4g}" for value in answer.ravel().tolist())


def _from_mean(values: Array) -> tuple[float, float]:
    """Mean and root-mean-square distance from the mean."""
    away = values - values.mean(axis=0)
    return float(np.abs(away).mean()), float(np.sqrt(np.square(away).mean()))


def sqnr(reference: Array, found: Array) -> Array:
    """Signal-to-quantization-noise ratio of each sample (n, ...) in dB, at most 200, which stands for equal."""
    signal, noise = (
        np.square(side).reshape(len(side), -1).sum(axis=1)
        for side in (reference.astype(np.float64), found.astype(np.float64) - reference)
    )
    decibel: Array = np.minimum(10 * np.log10(np.maximum(signal, 1e-300) / np.maximum(noise, 1e-300)), 200.0)
    return np.where(noise == 0, 200.0, decibel)


def cosine(reference: Array, found: Array) -> Array:
    """Cosine of the angle between both, per sample (n, ...); 1 if both are zero."""
    a, b = (side.reshape(len(side), -1).astype(np.float64) for side in (reference, found))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (a == 0).all(axis=1) & (b == 0).all(axis=1)
    return np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.maximum(lengths, 1e-300))


class Arrays(Family):
    """All outputs, whatever they mean; only your own metric can judge their quality."""

    metrics = (
        Metric("error", "likeness", "lower", "mean", "%"),
        Metric("sqnr", "likeness", "higher", "mean", "dB"),
        Metric("cosine", "likeness", "higher", "mean"),
    )

    def likeness(self, outputs: Outputs, reference: Outputs, targets: Outputs) -> Columns:
        """The worst output counts, so that a ruined one cannot hide behind others."""
        ratio, angle = (
            np.min([of(reference[name], outputs[name]) for name in reference], axis=0) for of in (sqnr, cosine)
        )
        return {"error": Column.of(10 ** (-ratio / 20)), "sqnr": Column.of(ratio), "cosine": Column.of(angle)}

    def seen(self, outputs: Outputs, targets: Outputs) -> dict[str, Column | Array]:
        """For each output, the sum of all samples, and each sample's sum of squares."""
        found: dict[str, Column | Array] = {}
        for name, array in outputs.items():
            wide = array.astype(np.float64)
            found[name] = wide.sum(axis=0)
            found[f"{name} squared"] = Column.of(np.square(wide).reshape(len(wide), -1).sum(axis=1))
        return found

    def naive(self, seen: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, float]]:
        """The error as a share of the size of all samples together, which is close to the mean over samples."""
        squares = {name.removesuffix(" squared"): one.values for name, one in seen.items() if isinstance(one, Column)}
        errors = [
            max(0.0, 1 - np.square(seen[name]).sum() / len(one) / max(one.sum(), 1e-300))
            for name, one in squares.items()
        ]
        return "always giving the mean of each output", {"error": float(np.sqrt(max(errors)))}


class Flow(Family):
    """Optical flow; ``targets["flow"]`` (n, H, W, 2), not finite at pixels that do not count.

    Outliers are KITTI's: off by more than 3 pixels and by more than 5 % of the true motion (Menze & Geiger 2015).
    """

    metrics = (
        Metric("epe", "quality", "lower", "mean", "px"),
        Metric("outliers", "quality", "lower", "fraction", "%"),
        Metric("distance", "likeness", "lower", "mean", "px"),
        Metric("sqnr", "likeness", "higher", "mean", "dB"),
    )
    targets = ("flow",)
    telling = ("epe",)
    output = "flow"  # (n, H, W, 2): `OpticalFlow.check` requires it
    says = "saying that nothing moves"

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """End-point errors and outliers at the known pixels."""
        known = np.asarray(np.isfinite(targets["flow"]).all(axis=-1))
        truth = np.where(known[..., None], targets["flow"], 0).astype(np.float64)
        errors = np.linalg.norm(outputs["flow"] - truth, axis=-1)
        outliers = (errors > 3) & (errors > 0.05 * np.linalg.norm(truth, axis=-1))
        return {"epe": Column.mean(errors, known), "outliers": Column.mean(outliers, known)}

    def likeness(self, outputs: Outputs, reference: Outputs, targets: Outputs) -> Columns:
        """Mean distance of the two flows, and the signal-to-noise ratio."""
        found, expected = outputs["flow"], reference["flow"]
        distance = np.linalg.norm(found.astype(np.float64) - expected, axis=-1).reshape(len(found), -1).mean(axis=1)
        return {"distance": Column.of(distance), "sqnr": Column.of(sqnr(expected, found))}

    def guess(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """Nothing moves."""
        return {"flow": np.zeros_like(outputs["flow"])}


_MOST = 100.0  # dB, which stands for equal
_VIDEO, _SOUND = "video", "sound"  # `VideoAutoencoding.check` requires them


class Reconstruction(Family):
    """Frames and sound; ``targets``: the inputs ``frames`` (n, T, H, W, 3) in [0, 1] and ``audio`` (n, samples, 1)."""

    metrics = (
        Metric("psnr", "quality", "higher", "mean", "dB"),
        Metric("ssim", "quality", "higher", "mean"),
        Metric("sound snr", "quality", "higher", "mean", "dB"),
        Metric("sqnr", "likeness", "higher", "mean", "dB"),
    )
    targets = ("frames",)
    telling = ("psnr",)
    says = "giving frames of one color and silence"

    def quality(self, outputs: Outputs, targets: Outputs) -> Columns:
        """PSNR and SSIM; for sound, if there is any, its SNR."""
        frames, found = targets["frames"].astype(np.float64), outputs[_VIDEO].astype(np.float64)
        error = np.square(found - frames).reshape(len(frames), -1).mean(axis=1)
        columns = {
            "psnr": Column.of(np.minimum(-10 * np.log10(np.maximum(error, 1e-12)), _MOST)),
            "ssim": Column.of(np.array([_ssim(*pair) for pair in zip(frames, found, strict=True)])),
        }
        if "audio" in targets and _SOUND in outputs:
            sound = targets["audio"].reshape(len(frames), -1)
            columns["sound snr"] = Column.of(np.minimum(sqnr(sound, outputs[_SOUND].reshape(sound.shape)), _MOST))
        return columns

    def likeness(self, outputs: Outputs, reference: Outputs, targets: Outputs) -> Columns:
        """Signal-to-noise ratio of the frames."""
        return {"sqnr": Column.of(sqnr(reference[_VIDEO], outputs[_VIDEO]))}

    def guess(self, outputs: Outputs, targets: Outputs) -> Outputs:
        """Frames of one color, the input's mean, and silence."""
        mean = targets["frames"].mean(axis=(1, 2, 3), keepdims=True)
        video = np.broadcast_to(mean, outputs[_VIDEO].shape)
        return {**outputs, _VIDEO: video, _SOUND: np.zeros_like(outputs[_SOUND])}

    def reads(self, metric: str, outputs: Sequence[str]) -> tuple[str, ...]:
        """Frames or sound."""
        return (_SOUND,) if metric == "sound snr" else (_VIDEO,)


def _ssim(expected: Array, found: Array) -> float:
    """Mean structural similarity of frames (T, H, W, 3) with values in [0, 1] (Wang et al. 2004)."""
    similarity: Callable[..., float] = require("skimage.metrics", "SSIM", "validate").structural_similarity
    size = min(7, *(side - 1 + side % 2 for side in expected.shape[1:3]))  # odd, and no larger than a frame
    pairs = zip(expected, found, strict=True)
    return float(np.mean([similarity(*pair, win_size=size, channel_axis=-1, data_range=1.0) for pair in pairs]))
