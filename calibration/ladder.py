# SPDX-License-Identifier: Apache-2.0
"""The ladder of a search: mixtures of precisions, each with one layer at a higher precision than the one before.

From the scheme that was asked for a layer goes back to int8 weights with float activations, then to float. A step's
effect is the noise that it takes from the model's outputs: the layer's by itself in the one precision less that in the
other, measured, as a share of the signal. Noise of small independent errors adds up, so the ladder takes the steps with
the largest effect first. Where float takes away more beyond int8 weights than these do, the layer skips them: of a
convex hull only corners are worth a try (Sinha & Zoltners, The Multiple-Choice Knapsack Problem, Oper. Res. 1979).

Float is what the graph has: fp32 on CPUs, where fp16 gains no time unless they have its arithmetic, as few do (engines
compute in fp32 in any case). In a TensorRT engine built with --precision fp16 the same layers run in fp16, but for
those that would overflow (`lowering.half`): there the last rung of a layer is its fp16 rung.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from perceiver_export.calibration.observe import Observation, Report
from perceiver_export.calibration.pipeline import compare_with_fp32, write_quantized
from perceiver_export.calibration.plan import Scheme
from perceiver_export.calibration.quantize_part import PartOptions
from perceiver_export.calibration.sensitivity import GroupSensitivity, group_sensitivity
from perceiver_export.calibration.write import new_bundle
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import UsageError

_MIDDLE: Scheme = "int8-weights"


class Step(msgspec.Struct, frozen=True):
    """One layer back to a higher precision; ``effect`` is the noise taken from the outputs, a share of the signal."""

    group: str
    scheme: Scheme
    effect: float


def order_steps(noise: Mapping[str, float], in_middle: Mapping[str, float]) -> tuple[Step, ...]:
    """Steps, those with the largest effect first; the last one, after which all were float, is left out.

    ``noise`` is each layer's in its scheme, ``in_middle`` that in int8 weights, where the layer may go there.
    """
    found: list[Step] = []
    for group, most in noise.items():
        left = in_middle.get(group)
        if left is None or most - left < left:
            found.append(Step(group, "float", most))
        else:
            found += [Step(group, _MIDDLE, most - left), Step(group, "float", left)]
    # Stable, so a layer's own two steps keep their order where they are equal.
    return tuple(sorted(found, key=lambda step: -step.effect))


def mixtures(asked: Mapping[str, Scheme], steps: Sequence[Step]) -> list[dict[str, Scheme]]:
    """Each rung's scheme of every layer, as it was ``asked``, then after each step; none that is all float."""
    found = [dict(asked)]
    for step in steps:
        found.append({**found[-1], step.group: step.scheme})
    return [mixture for mixture in found if set(mixture.values()) != {"float"}]


class Ladder:
    """The rungs of a bundle, each quantized when it is asked for. The data is gone through once for all of them.

    ``ranking``: layers by what they cost in the scheme that was asked for. Raises UsageError where all stay float.
    """

    def __init__(
        self,
        source: Bundle,
        observation: Observation,
        options: PartOptions,
        min_coverage: float,
        threads: int | None,
        report: Report,
    ) -> None:
        self._source, self._observation, self._options = source, observation, options
        self._min_coverage, self._threads, self._report = min_coverage, threads, report
        self.ranking = self._measure(options)
        asked = {one.group: one.scheme for one in self.ranking}
        if not asked:
            raise UsageError("no layer is left to quantize", "keep fewer of them float")
        above = {glob.escape(group): _MIDDLE for group, scheme in asked.items() if scheme != _MIDDLE}
        middle = dataclasses.replace(options, precision={"*": "float", **above})
        self.steps = order_steps(_noise(self.ranking), _noise(self._measure(middle)))
        self.rungs = mixtures(asked, self.steps)

    def raised(self, index: int) -> dict[str, Scheme]:
        """The layers of a rung that went back, in the order in which they did."""
        return {step.group: self.rungs[index][step.group] for step in self.steps[:index]}

    def build(self, index: int, path: Path) -> None:
        """Write the bundle of a rung to ``path``. Raises what `quantize` raises."""
        back = self.raised(index)
        raised = {glob.escape(group): scheme for group, scheme in back.items()}
        # Of several patterns the last one that fits decides, so what went back comes after what was asked.
        asked = {name: scheme for name, scheme in self._options.precision.items() if name not in raised}
        options = dataclasses.replace(self._options, precision={**asked, **raised}, raised=frozenset(back))
        with new_bundle(path, overwrite=False) as directory:
            settings = (self._min_coverage, self._report)
            write_quantized(self._source, options, self._copy(), directory, path.name, *settings)

    def complete(self, path: Path) -> None:
        """Into the record of the rung at ``path``, which is the one that is kept: what `quantize` measures of it. All
        others are judged and timed on data, so that nobody would read it.
        """
        compare_with_fp32(self._source, self._observation, path, self._threads)

    def _measure(self, options: PartOptions) -> tuple[GroupSensitivity, ...]:
        return group_sensitivity(self._source, self._copy(), options, self._threads, self._report)

    def _copy(self) -> Observation:
        """Smoothing changes statistics, and the next rung needs them as they were seen."""
        return dataclasses.replace(self._observation, statistics=copy.deepcopy(self._observation.statistics))


def _noise(ranking: Sequence[GroupSensitivity]) -> dict[str, float]:
    """Noise in the outputs as a share of the signal; of a name in several parts the worst."""
    return {one.group: 10 ** (-one.output_sqnr / 10) for one in reversed(ranking)}
