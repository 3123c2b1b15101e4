# SPDX-License-Identifier: Apache-2.0
"""From DeepMind's pickle to an answer on ONNX Runtime: what their code computed comes out of the bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perceiver_export.exporter import ExportOptions, export
from perceiver_export.runtimes import load as load_bundle

from .deepmind_reference import Array, arrays, facts, load, model_folders, tolerance


def feeds_and_outputs(folder: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The recorded inputs as our graphs take them, and the recorded name of each of our outputs."""
    recorded, name = arrays(folder), facts(folder)["name"]
    if name == "language":
        tokens, mask = recorded["in/inputs"], recorded["in/input_mask"]
        return {"tokens": tokens.astype(np.int32), "tokens_mask": mask.astype(np.int32)}, {"logits": "out/logits"}
    if name == "optical_flow":
        return {"frames": _channels_first(recorded["in/frames"])}, {"flow": "out/flow"}
    if name == "video_autoencoding":
        feeds = {"audio": recorded["in/audio"], "frames": recorded["in/images"]}
        return feeds, {"sound": "out/audio", "video": "out/image", "label": "out/label"}
    return {"image": _channels_first(recorded["in/images"])}, {"logits": "out/logits"}


def _channels_first(pictures: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(pictures, -1, -3))


@pytest.mark.parametrize("folder", model_folders(), ids=lambda folder: folder.name)
def test_bundles_give_what_deepminds_code_gives(folder: Path, tmp_path: Path) -> None:
    feeds, outputs = feeds_and_outputs(folder)
    bundle = export(load(folder), tmp_path / "bundle", ExportOptions(batch=len(next(iter(feeds.values())))))

    assert bundle.manifest.parity == "deepmind"
    with load_bundle(bundle) as runtime:
        found = runtime.run(feeds)
    assert found.keys() == outputs.keys()
    for name, key in outputs.items():
        expected = arrays(folder)[key]
        assert np.abs(found[name].reshape(expected.shape) - expected).max() <= tolerance(folder, key)
