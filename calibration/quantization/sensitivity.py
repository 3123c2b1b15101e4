# SPDX-License-Identifier: Apache-2.0
"""The cost of each layer, predicted from an fp32 bundle or measured in a quantized one; and the ladder of a search.

`measure_sensitivity` quantizes one layer at a time and leaves all others float. For each it gives the SQNR of the
layer's own products on sampled rows, and the SQNR of the model's outputs, in dB. The second matters: a softmax of large
scores may turn a layer's small error into a large error of the output.

`measure_layer_errors` compares each linear layer's product in a quantized bundle with fp32's, on the same inputs. It
also reveals a scale that was damaged or computed from the wrong data. Later layers include the errors of earlier ones,
but a layer that is wrong itself stands out.

The ladder has mixtures of precisions, each with one layer at a higher precision than the mixture before. From the
requested scheme, a layer goes back to int8 weights with float activations, then to float. A step's effect is the noise
that it removes from the model's outputs, as a share of the signal: the difference between the layer's noise in the two
precisions, both measured with only this layer quantized. Noise of small independent errors adds up, so steps are
ordered by effect, largest first. If the step to float removes more noise than the step to int8 weights, the layer skips
int8 weights, because only corners of a convex hull are worth a trial (Sinha & Zoltners, The Multiple-Choice Knapsack
Problem, Oper. Res. 1979).

"Float" is fp32 on CPUs. In a TensorRT engine built with --precision fp16 the same layers run in fp16, except those that
would overflow (`lowering.half`).
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from perceiver_export.calibration.bundles import new_bundle
from perceiver_export.calibration.data.calls import Call, batch_size, batches, run_parts
from perceiver_export.calibration.data.samples import Samples, stack
from perceiver_export.calibration.data.sources import Data
from perceiver_export.calibration.graphs import decibels, load_graph, open_session, run_session, sqnr
from perceiver_export.calibration.quantization.integers import LinearPlan, write_qdq
from perceiver_export.calibration.quantization.linears import find_linears
from perceiver_export.calibration.quantization.options import QuantizeOptions, Scheme
from perceiver_export.calibration.quantization.part import PlannedPart, plan_part
from perceiver_export.calibration.quantization.pipeline import check_options, write_quantized
from perceiver_export.calibration.quantization.record import GroupSensitivity
from perceiver_export.calibration.quantization.statistics import NO_SAMPLES, Observation, Report, observe
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.tokenizers import tokenizer_of

SAMPLES = 32
_MIDDLE: Scheme = "int8-weights"


def measure_sensitivity(
    bundle: BundleLike,
    data: Data,
    options: QuantizeOptions = QuantizeOptions(samples=SAMPLES),
    *,
    progress: Report | None = None,
) -> tuple[GroupSensitivity, ...]:
    """Sensitivity of every layer of an fp32 bundle, the most harmful first. Takes a short run per layer.

    Omits layers that stay float, and ignores gates and coverage. Raises the errors of `quantize`.
    """
    report = progress or (lambda what, done, total: None)
    source = open_bundle(bundle)
    check_options(options, source)
    return group_sensitivity(source, observe(source, data, options, report), options, report)


def group_sensitivity(
    source: Bundle, observation: Observation, options: QuantizeOptions, report: Report
) -> tuple[GroupSensitivity, ...]:
    """`measure_sensitivity` from an observation; smoothing changes its statistics."""
    found: list[GroupSensitivity] = []
    for name, part in source.manifest.parts.items():
        statistics = observation.statistics[name]
        planned = plan_part(source.file(part.file), statistics, options)
        total = sum(plan.linear.macs for plan in planned.plans)
        groups: dict[str, list[tuple[LinearPlan, float]]] = {}
        for plan in planned.plans:
            if (product := plan.product_sqnr(statistics)) is not None:
                groups.setdefault(plan.linear.group, []).append((plan, product))
        for index, (group, measured) in enumerate(groups.items()):
            report(f"sensitivity of {name}", index, len(groups))
            plans, products = zip(*measured, strict=True)
            output = _output_sqnr(planned, plans, source.path, name, observation.calls, options.threads)
            share = sum(plan.linear.macs for plan in plans) / total
            found.append(GroupSensitivity(name, group, min(products), output, share, plans[0].scheme))
    return tuple(sorted(found, key=lambda one: one.output_sqnr))


def _output_sqnr(
    planned: PlannedPart,
    plans: Sequence[LinearPlan],
    folder: Path,
    part: str,
    calls: tuple[Call, ...],
    threads: int | None,
) -> float:
    """The least SQNR of the part's outputs with only these linears quantized."""
    model = planned.model.clone()
    linears = {linear.name: linear for linear in find_linears(model.graph)[0]}
    write_qdq(model, [replace(one, linear=linears[one.linear.name]) for one in plans])
    session = open_session(model, folder, threads)
    results = [run_session(session, call.feeds[part]) for call in calls]
    return min(
        sqnr(*(np.concatenate([one[name] for one in side]) for side in ([c.outputs[part] for c in calls], results)))
        for name in results[0]
    )


class Step(NamedTuple):
    """One layer's return to a higher precision. ``effect`` is the noise that it removes, as a share of the signal."""

    group: str
    scheme: Scheme
    effect: float


def order_steps(noise: Mapping[str, float], in_middle: Mapping[str, float]) -> tuple[Step, ...]:
    """Steps in the order of their effects, largest first.

    ``noise`` is each layer's noise in its scheme; ``in_middle`` is its noise with int8 weights, if it may have them.
    """
    found: list[Step] = []
    for group, most in noise.items():
        left = in_middle.get(group)
        if left is None or most - left < left:
            found.append(Step(group, "float", most))
        else:
            found += [Step(group, _MIDDLE, most - left), Step(group, "float", left)]
    # The sort is stable, so a layer's two steps keep their order if their effects are equal.
    return tuple(sorted(found, key=lambda step: -step.effect))


def mixtures(asked: Mapping[str, Scheme], steps: Sequence[Step]) -> list[dict[str, Scheme]]:
    """The scheme of every layer on each rung: first as ``asked``, then after each step, without all-float mixtures."""
    found = [dict(asked)]
    for step in steps:
        found.append({**found[-1], step.group: step.scheme})
    return [mixture for mixture in found if set(mixture.values()) != {"float"}]


class Ladder:
    """The rungs of a bundle, each quantized on demand from one pass over the data.

    ``ranking`` has the layers by their noise in the requested scheme, the worst first.
    """

    def __init__(self, source: Bundle, observation: Observation, options: QuantizeOptions, report: Report) -> None:
        self._source, self._observation, self._options, self._report = source, observation, options, report
        self.ranking = self._measure(options)
        asked = {one.group: one.scheme for one in self.ranking}
        above = {glob.escape(group): _MIDDLE for group, scheme in asked.items() if scheme != _MIDDLE}
        middle = replace(options, precision={"*": "float", **above}, keep_float=())
        self._steps = order_steps(_noise(self.ranking), _noise(self._measure(middle)))
        self.rungs = mixtures(asked, self._steps)

    def raised(self, index: int) -> dict[str, Scheme]:
        """The layers of a rung at a higher precision, in the order of the steps."""
        return {step.group: self.rungs[index][step.group] for step in self._steps[:index]}

    def build(self, index: int, path: Path) -> None:
        """Write the bundle of a rung to ``path``. Raises the errors of `quantize`."""
        back = self.raised(index)
        raised = {glob.escape(group): scheme for group, scheme in back.items()}
        # The last matching pattern applies, so the raised layers come after the requested schemes.
        asked = {name: scheme for name, scheme in self._options.schemes.items() if name not in raised}
        options = replace(self._options, precision={**asked, **raised}, keep_float=())
        with new_bundle(path, overwrite=False) as directory:
            write_quantized(self._source, options, self._copy(), directory, path.name, self._report, back)

    def _measure(self, options: QuantizeOptions) -> tuple[GroupSensitivity, ...]:
        return group_sensitivity(self._source, self._copy(), options, self._report)

    def _copy(self) -> Observation:
        """A copy, because smoothing changes statistics and the next rung needs them unchanged."""
        return replace(self._observation, statistics=copy.deepcopy(self._observation.statistics))


def _noise(ranking: Sequence[GroupSensitivity]) -> dict[str, float]:
    """By layer, the noise in the outputs as a share of the signal; the worst if several parts have the name."""
    return {one.group: 10 ** (-one.output_sqnr / 10) for one in reversed(ranking)}


class LayerError(msgspec.Struct, frozen=True):
    """A layer and the SQNR of its product in dB, of its worst run if it runs more than once."""

    part: str
    group: str
    sqnr: float


def measure_layer_errors(
    bundle: BundleLike, reference: BundleLike, data: Data, samples: int = 8, threads: int | None = None
) -> tuple[LayerError, ...]:
    """Compare the linear layers of two bundles of one model, the second in fp32; the worst layer first.

    If smoothing was folded into a value projection, its channels have other scales than in fp32, so each channel's best
    gain is applied first. Raises DataError, and UsageError if the bundles have different linear layers.
    """
    opened, exact = open_bundle(bundle), open_bundle(reference)
    if opened.manifest.parts.keys() != exact.manifest.parts.keys():
        raise UsageError("the two bundles have different parts", "compare a bundle with the one it was made from")
    watched = {
        name: _Watched(opened.file(opened.part(name).file), exact.file(part.file), threads)
        for name, part in exact.manifest.parts.items()
    }
    examples = Samples(data, exact.manifest, samples, tokenizer=tokenizer_of(exact))
    runs = {name: one.run for name, one in watched.items()}
    for batch in batches(examples.stream, batch_size(exact.manifest)):
        run_parts(exact.manifest, runs, stack(batch), np.random.default_rng(0))
    if not any(one.sums for one in watched.values()):
        raise DataError(*NO_SAMPLES)
    found = [LayerError(name, group, error) for name, one in watched.items() for group, error in one.errors().items()]
    return tuple(sorted(found, key=lambda error: error.sqnr))


class _Watched:
    """Both graphs of a part, with the linear layers' products as outputs; ``sums`` has signal and noise of each."""

    def __init__(self, quantized: Path, exact: Path, threads: int | None) -> None:
        graph = load_graph(exact).graph
        self._groups = {str(one.output.name): one.group for one in find_linears(graph)[0]}
        self._outputs = [str(value.name) for value in graph.outputs]
        self._sessions = [self._open(path, threads) for path in (exact, quantized)]
        self.sums: dict[str, Array] = {}

    def _open(self, path: Path, threads: int | None) -> Any:
        """A session that also gives the products. Raises UsageError if the graph lacks one."""
        model = load_graph(path)
        values = {str(value.name): value for node in model.graph for value in node.outputs}
        if missing := [name for name in self._groups if name not in values]:
            raise UsageError(f"{path} has no {missing[0]}", "compare a bundle with the one it was made from")
        model.graph.outputs.extend(values[name] for name in self._groups if not values[name].is_graph_output())
        return open_session(model, path.parent, threads)

    def run(self, feeds: Feeds) -> Mapping[str, Array]:
        """Return the exact outputs, and add up the errors of all products."""
        exact, found = (run_session(session, feeds) for session in self._sessions)
        for name, group in self._groups.items():
            signal = exact[name].reshape(-1, exact[name].shape[-1]).astype(np.float64)
            other = found[name].reshape(signal.shape).astype(np.float64)
            if ".value" in group:
                other *= (signal * other).sum(axis=0) / np.maximum(np.square(other).sum(axis=0), 1e-300)
            with np.errstate(invalid="ignore", over="ignore"):  # `decibels` handles values that are not finite
                sums = np.array([np.square(signal).sum(), np.square(other - signal).sum()])
            self.sums[name] = self.sums.get(name, np.zeros(2)) + sums
        return {name: exact[name] for name in self._outputs}

    def errors(self) -> dict[str, float]:
        """SQNR in dB by group, of its worst run; -200 if a product is not finite."""
        found: dict[str, float] = {}
        for name, sums in self.sums.items():
            group = self._groups[name]
            found[group] = min(found.get(group, np.inf), decibels(*sums))
        return found
