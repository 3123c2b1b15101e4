# SPDX-License-Identifier: Apache-2.0
"""Run bundles as policies in the simulator on the same episodes, and compare how often they succeed.

    pip install metaworld
    python -m examples.policy.closed_loop policy policy-int8 --episodes 500

The first bundle is the reference. An episode's seed draws the place of the puck and the goal; all bundles get the same
episodes. The bounds are those of `validate`: exact, one-sided, 95 % each. Torch is not imported.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.calibration.validation import statistics
from perceiver_export.runtimes import load
from perceiver_export.runtimes.runtime import Array, Runtime

TASK = "pick-place-v3"
STEPS = 150  # the most in an episode; the expert needs about 60
REPLAN = 8  # actions of a chunk that are carried out before the policy is asked again
FIRST_SEED = 100_000  # training and test data have smaller seeds

Act = Callable[[Array], Array]


def simulator(camera: str | None = None) -> Any:
    """The robot arm, a puck and a goal, all in the state; with ``camera`` it renders frames."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    mode = None if camera is None else "rgb_array"
    made = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{TASK}-goal-observable"](seed=0, render_mode=mode)
    made.seeded_rand_vec, made._freeze_rand_vec = True, False  # each reset draws from the seed
    if camera is not None:
        made.mujoco_renderer.camera_id = made.model.camera(camera).id
    return made


def expert() -> Act:
    """Meta-World's scripted expert, with its actions clipped to the robot's limits."""
    import warnings

    from metaworld.policies import ENV_POLICY_MAP

    scripted = ENV_POLICY_MAP[TASK]()

    def act(state: Array) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the clipping
            clipped: Array = np.clip(scripted.get_action(state), -1, 1)
        return clipped

    return act


def chunked(runtime: Runtime, times: list[float]) -> Act:
    """A policy that predicts a chunk and carries out its first actions. Adds the seconds of each call to ``times``."""
    waiting: list[Array] = []

    def act(state: Array) -> Array:
        if not waiting:
            begun = time.perf_counter()
            (actions,) = runtime.run({"state": state[None].astype(np.float32)}).values()
            times.append(time.perf_counter() - begun)
            waiting.extend(np.clip(actions[0, :REPLAN], -1, 1))
        return waiting.pop(0)

    return act


def steps(simulated: Any, act: Act, seed: int) -> Iterator[tuple[Array, bool]]:
    """The states of an episode, each with whether the puck is at its goal."""
    simulated.seed(seed)
    state, _ = simulated.reset()
    for _ in range(STEPS):
        state, _, _, _, told = simulated.step(act(state))
        yield state, bool(told["success"])


def episodes(simulated: Any, new_policy: Callable[[], Act], seeds: range) -> Array:
    """Whether each episode succeeds; it ends there."""
    return np.array([any(done for _, done in steps(simulated, new_policy(), seed)) for seed in seeds])


def _percent(found: statistics.Estimate) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*(100 * one for one in (found.value, found.lower, found.upper)))


def compare(names: list[str], results: list[Array], times: list[list[float]]) -> Iterator[dict[str, Any]]:
    """A row for each policy: its success, and its paired drop from the first policy with bounds."""
    for name, found, seconds in zip(names, results, times, strict=True):
        total = len(found)
        row: dict[str, Any] = {
            "policy": name,
            "episodes": total,
            "success %": statistics.share(int(found.sum()), total),
        }
        if seconds:
            row["ms a call"] = 1e3 * float(np.median(seconds))
            row["ms an action"] = row["ms a call"] / REPLAN
        if found is not results[0] and seconds:
            lost, gained = int((results[0] & ~found).sum()), int((found & ~results[0]).sum())
            row |= {"lost": lost, "gained": gained, "drop": statistics.drop(lost, gained, total)}
        yield row


def main() -> None:
    """Run the episodes and print a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--device", default="auto", help="target of the bundles")
    parser.add_argument("--expert", action="store_true", help="run the scripted expert too")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args()
    simulated, seeds = simulator(), range(FIRST_SEED, FIRST_SEED + options.episodes)
    results, times = list[Array](), list[list[float]]()
    for bundle in options.bundles:
        with load(bundle, options.device) as runtime:
            times.append([])
            results.append(episodes(simulated, partial(chunked, runtime, times[-1]), seeds))
    names = list(map(str, options.bundles))
    if options.expert:
        names, times = [*names, "the scripted expert"], [*times, []]
        results.append(episodes(simulated, expert, seeds))
    for row in compare(names, results, times):
        print(_text(row) if not options.json else json.dumps(row, default=lambda one: _percent(one)))


def _text(row: dict[str, Any]) -> str:
    said = f"{row['policy']}: success {_percent(row['success %'])} % of {row['episodes']} episodes"
    if "ms a call" in row:
        said += f", {row['ms a call']:.2f} ms a call, {row['ms an action']:.3f} ms an action"
    if "drop" in row:
        said += f"; worse than the first by {_percent(row['drop'])} points (lost {row['lost']}, gained {row['gained']})"
    return said


if __name__ == "__main__":
    main()
