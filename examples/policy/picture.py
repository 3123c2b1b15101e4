# SPDX-License-Identifier: Apache-2.0
"""Draw an episode as a strip of frames: `python -m examples.policy.picture policy-int8 -o episode.png`.

MUJOCO_GL=osmesa renders without a GPU; on Debian it needs libosmesa6, and `pip install pyopengl`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from examples.policy.closed_loop import FIRST_SEED, chunked, simulator, steps
from perceiver_export.runtimes import load

FRAMES, SIDE, CAMERA = 5, 200, "corner3"


def main() -> None:
    """Run one episode and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    options = parser.parse_args()
    simulated, frames = simulator(CAMERA), []
    with load(options.bundle) as runtime:
        played = [done for _, done in steps(simulated, chunked(runtime, []), options.seed)]
        shown = np.linspace(0, played.index(True) if True in played else len(played) - 1, FRAMES).astype(int)
        for index, _ in enumerate(steps(simulated, chunked(runtime, []), options.seed)):  # the same episode again
            if index in shown:
                frames.append(np.asarray(simulated.render())[::-1, ::-1])  # Meta-World's camera hangs upside down
            if len(frames) == FRAMES:
                break
    strip = Image.fromarray(np.concatenate(frames, 1))
    strip.resize((FRAMES * SIDE, SIDE)).quantize(128).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
