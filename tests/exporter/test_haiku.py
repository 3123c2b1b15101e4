# SPDX-License-Identifier: Apache-2.0
"""Loading DeepMind's pickles: the six released lists of parameters, transformers' copies of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from perceiver_export.exporter import load_model
from perceiver_export.exporter.checkpoints.haiku import HaikuModel, haiku_sources, ignored_names, load_haiku_state
from perceiver_export.exporter.checkpoints.huggingface import huggingface_sources
from perceiver_export.exporter.model.config import ImageInput
from perceiver_export.exporter.presets import PRESETS
from perceiver_export.runtimes.errors import CheckpointError
from perceiver_export.runtimes.preprocessing import (
    CenterCropShare,
    FlowPreprocessing,
    ImagePreprocessing,
    Resize,
    TextPreprocessing,
    VideoPreprocessing,
)
from tests.vector_folders import VECTORS

from . import haiku_writer
from .conftest import MakeCheckpoint, make_transformers_model
from .deepmind_reference import load, sizes

COPIES: dict[str, HaikuModel] = {  # by the name of transformers' class
    "learned": "imagenet-learned",
    "fourier": "imagenet-fourier",
    "conv": "imagenet-conv",
    "language": "language",
    "flow": "optical-flow",
    "video": "video-autoencoding",
}


@pytest.mark.parametrize("model", COPIES.values())
def test_released_parameters_fit_exactly(model: HaikuModel) -> None:
    released = json.loads((VECTORS / "released_param_shapes.json").read_text(encoding="utf-8"))[model.replace("-", "_")]
    with torch.device("meta"):  # shapes without numbers: 201 million parameters take no memory
        state = {name: torch.empty(shape) for name, shape in {**released["params"], **released["state"]}.items()}
        preset = PRESETS["language-bytes" if model == "language" else model]
        network = load_haiku_state(model, state, preset.build("deepmind"))

    unread = sum(state[name].numel() for name in ignored_names(released["params"]))
    assert (unread > 0) == (model == "video-autoencoding")
    assert sum(one.numel() for one in network.parameters()) + unread == released["num_params"]


@pytest.mark.parametrize("parity", ["huggingface", "deepmind"])
@pytest.mark.parametrize("kind", COPIES)
def test_a_pickle_and_transformers_copy_of_it_are_one_model(
    kind: str, parity: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = COPIES[kind]
    copy = load_model(make_checkpoint(kind), parity=parity)
    own_names = [name for name in copy.model.state_dict() if not name.endswith("num_batches_tracked")]
    pickle = haiku_writer.write(tmp_path / "params.pickle", _haiku_of(kind, model, own_names, copy.task))
    config = tmp_path / "sizes.json"
    config.write_bytes(msgspec.json.encode(copy.config))  # as a bundle's manifest has it

    found = load_model(f"deepmind:{model}:{pickle}", parity=parity, config=config)

    assert found.config == copy.config
    assert (found.task, found.parity, found.split) == (copy.task, copy.parity, copy.split)
    steps = copy.preprocessing
    if isinstance(steps, VideoPreprocessing):  # config.json does not say its rate
        steps = msgspec.structs.replace(steps, sample_rate=48_000)
    assert (found.labels, found.preprocessing) == (copy.labels, steps)
    expected, state = copy.model.state_dict(), found.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def _haiku_of(kind: str, model: HaikuModel, own_names: Iterable[str], task: str) -> object:
    """The content of a pickle whose copy in transformers is ``make_transformers_model(kind)``.

    transformers' conversion of DeepMind's pickles renames, takes ``numpy.transpose`` of every weight (of convolutions
    too, all four axes) and drops axes of size one.
    """
    published = make_transformers_model(kind).state_dict()
    tree: dict[str, dict[str, object]] = {}
    for own in own_names:
        array = published[huggingface_sources(task)(own).name].numpy()
        module, _, parameter = haiku_sources(model)(own).name.rpartition("/")
        if parameter == "w":
            array = np.transpose(array)
        if "batchnorm" in module:
            array = array.reshape(1, 1, 1, -1)
        tree.setdefault(module, {})[parameter] = np.ascontiguousarray(array)
    state = {module: tree.pop(module) for module in list(tree) if module.endswith("_ema")}
    params = haiku_writer.flat_mappings(tree)
    return {"params": params, "state": haiku_writer.flat_mappings(state)} if state else params


def test_tasks_preprocessing_and_labels_are_the_originals() -> None:
    learned, language, flow, video = (
        load(VECTORS / name) for name in ("imagenet_learned", "language", "optical_flow", "video_autoencoding")
    )

    assert [one.task for one in (learned, language, flow, video)] == [
        "image-classification",
        "fill-mask",
        "optical-flow",
        "video-autoencoding",
    ]
    picture = learned.preprocessing
    assert isinstance(picture, ImagePreprocessing)
    assert picture.steps[:2] == (CenterCropShare(224 / 256, 224 / 256, round_up=True), Resize(12, 16, "opencv-bicubic"))
    assert language.preprocessing == TextPreprocessing(32, special_tokens=False)
    assert flow.preprocessing == FlowPreprocessing(16, 24, min_overlap=4)
    assert video.preprocessing == VideoPreprocessing(4, 16, 16, 128, 48_000)
    assert [len(one.labels) for one in (learned, language, flow, video)] == [11, 0, 0, 72]
    assert (learned.labels[10], video.labels[71]) == ("LABEL_10", "LABEL_71")
    assert "LABEL_0" in learned.notes[0]
    assert [one.split for one in (learned, language, flow, video)] == [False, False, False, True]
    assert {one.source for one in (learned, language, flow, video)} == {"checkpoint.pickle"}


def test_another_image_size_is_noted() -> None:
    found = load(VECTORS / "imagenet_fourier", image_size=(20, 17))

    image = found.config.inputs["image"]
    assert isinstance(image, ImageInput)
    assert (image.height, image.width) == (20, 17)
    assert any("another size" in note for note in found.notes)


@pytest.mark.parametrize("name", ["imagenet-conv", "imagenet_conv", "imagenet_conv_preprocessing", "ImageNet-Conv"])
def test_models_have_the_names_that_deepmind_gives_them(name: str, tmp_path: Path) -> None:
    folder, config = VECTORS / "imagenet_conv", tmp_path / "sizes.json"
    config.write_text(json.dumps(sizes(folder)), encoding="utf-8")

    found = load_model(f"deepmind:{name}:{folder / 'checkpoint.pickle'}", config=config)

    assert found.config == load(folder).config


def test_without_a_config_sizes_are_the_released_models() -> None:
    with pytest.raises(CheckpointError, match="64 tensors are missing") as raised:
        load_model(f"deepmind:imagenet-conv:{VECTORS / 'imagenet_conv' / 'checkpoint.pickle'}")
    assert "preset:imagenet-conv" in raised.value.hint
    assert "--config" in raised.value.hint
