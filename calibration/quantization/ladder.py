# SPDX-License-Identifier: Apache-2.0
"""The ladder of a search: mixtures of precisions, each with one layer at a higher precision than the mixture before.

From the requested scheme, a layer goes back to int8 weights with float activations, then to float. A step's effect is
the noise that it removes from the model's outputs, as a share of the signal: the difference between the layer's noise
in the two precisions, both measured with only this layer quantized. Noise of small independent errors adds up, so steps
are ordered by effect, largest first. If the step to float removes more noise than the step to int8 weights, the layer
skips int8 weights, because only corners of a convex hull are worth a trial (Sinha & Zoltners, The Multiple-Choice
Knapsack Problem, Oper. Res. 1979).

"Float" is fp32 on CPUs. In a TensorRT engine built with --precision fp16 the same layers run in fp16, except those that
would overflow (`lowering.half`).
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from perceiver_export.calibration.bundles import new_bundle
from perceiver_export.calibration.quantization.options import QuantizeOptions, Scheme
from perceiver_export.calibration.quantization.pipeline import write_quantized
from perceiver_export.calibration.quantization.sensitivity import GroupSensitivity, group_sensitivity
from perceiver_export.calibration.quantization.statistics import Observation, Report
from perceiver_export.runtimes.bundle import Bundle

_MIDDLE: Scheme = "int8-weights"


class Step(NamedTuple):
    """One layer's return to a higher precision. ``effect`` is the noise that it removes, as a share of the signal."""

    group: str
    scheme: Scheme
    effect: float


def order_steps(noise: Mapping[str, float], in_middle: Mapping[str, float]) -> tuple[Step, ...]:
    """Steps in the order of their effects, largest first.

    ``noise`` is each layer's noise in its scheme, ``in_middle`` its noise with int8 weights, for layers that may have
    them.
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

    ``ranking`` has the layers by the noise of the requested scheme.
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
        """Write the bundle of a rung to ``path``. Raises what `quantize` raises."""
        back = self.raised(index)
        raised = {glob.escape(group): scheme for group, scheme in back.items()}
        # The last matching pattern decides, so the raised layers come after the requested schemes.
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
