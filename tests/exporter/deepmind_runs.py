# SPDX-License-Identifier: Apache-2.0
"""Every value that DeepMind's code recorded (`deepmind_reference`), computed by our models under the same keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from perceiver_export.exporter.checkpoints.huggingface import patches_to_kernel
from perceiver_export.exporter.model.config import FourierPositions, FramePairInput, PerceiverConfig, QueryDecoder
from perceiver_export.exporter.model.inputs import FramePairAdapter
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.runtimes.tasks import flow

from .deepmind_reference import Array, Change, arrays, changed, facts, load, precision


@torch.no_grad()
def computed(
    folder: Path, dtype: torch.dtype = torch.float32, change: Change | None = None, parity: str | None = None
) -> dict[str, Array]:
    """Every recorded value of a folder as our model computes it, with a mistake put in by ``change``."""
    with precision(dtype):
        found = _RUN[facts(folder)["name"].partition("_")[0]](_Reference(folder, dtype, change, parity))
    return {key: value.numpy() for key, value in found.items()}


@dataclass(frozen=True)
class _Reference:
    folder: Path
    dtype: torch.dtype
    change: Change | None
    parity: str | None

    def input(self, key: str) -> Tensor:
        array = torch.from_numpy(arrays(self.folder)[f"in/{key}"])
        return array.to(self.dtype) if array.is_floating_point() else array

    def model(self, image_size: tuple[int, int] | None = None) -> PerceiverIO:
        model = load(self.folder, image_size, self.parity).model
        return model if self.change is None else changed(model, self.change)


class Probe:
    """Values inside a model, caught while it runs: one list of tensors a place."""

    def __init__(self, model: PerceiverIO) -> None:
        self.model = model
        self.seen: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Probe:
        encoder, decoder = self.model.encoder, self.model.decoder
        assert isinstance(decoder.cross_attention, nn.Module)
        assert isinstance(decoder.output, nn.Module)
        layers = [layer for block in encoder.self_attentions for layer in block.children()]
        self._handles = [
            encoder.register_forward_pre_hook(self._before("encoder_inputs")),
            encoder.cross_attentions[0].register_forward_hook(self._after("latents_after_cross_attend")),
            *(layer.register_forward_hook(self._after("self_attends")) for layer in layers),
            encoder.register_forward_hook(self._after("latents")),
            decoder.cross_attention.register_forward_pre_hook(self._before("decoder_query")),
            decoder.cross_attention.register_forward_hook(self._after("decoder_cross_attend")),
            decoder.output.register_forward_hook(self._after("decoder_output")),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def values(self) -> dict[str, Tensor]:
        """By DeepMind's names; of the decoder's, those of several calls are put one after the other."""
        batch = max(one.shape[0] for seen in self.seen.values() for one in seen)
        values = {
            f"mid/{name}": torch.cat([one.expand(batch, -1, -1) for one in seen], dim=1)
            for name, seen in self.seen.items()
            if name != "self_attends"
        }
        for index, latents in enumerate(self.seen.get("self_attends", [])):
            values[f"mid/latents_after_self_attend_{index:02d}"] = latents
        return values

    def _before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: self.seen.setdefault(name, []).append(args[0])

    def _after(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, args, output: self.seen.setdefault(name, []).append(output)


def _run_language(reference: _Reference) -> dict[str, Tensor]:
    model = reference.model()
    tokens, mask = reference.input("inputs"), reference.input("input_mask")
    with Probe(model) as probe:
        found = {"out/logits": model({"tokens": tokens, "tokens_mask": mask})["logits"]}
    unmasked = changed(model, lambda config: replace(config, mask_queries=False))
    rows = {"tokens": tokens[1:3], "tokens_mask": mask[1:3]}
    found["out/rows_1_2/logits_no_query_mask"] = unmasked(rows)["logits"]
    found["out/rows_1_2/logits_no_masks"] = model({"tokens": tokens[1:3]})["logits"]
    return {**probe.values(), **found}


def _run_imagenet(reference: _Reference) -> dict[str, Tensor]:
    found = {}
    for suffix in ("", "_other_size"):
        if f"in/images{suffix}" not in arrays(reference.folder):
            continue
        image = reference.input(f"images{suffix}").permute(0, 3, 1, 2)
        height, width = image.shape[2:]
        model = reference.model((height, width))
        with Probe(model) as probe:
            found[f"out/logits{suffix}"] = model({"image": image})["logits"]
        found.update({f"{key}{suffix}": value for key, value in probe.values().items()})
        features = model.inputs["image"].features
        assert isinstance(features, nn.Module)
        found[f"mid/convnet_output{suffix}"] = features(image).permute(0, 2, 3, 1)
    return found


def _run_flow(reference: _Reference) -> dict[str, Tensor]:
    model = reference.model()
    with Probe(model) as probe:
        found = {"out/flow": model({"frames": reference.input("frames").permute(0, 1, 4, 2, 3)})["flow"]}
    found.update(probe.values())
    found["mid/patches"] = patches(reference.input("frames").permute(0, 1, 4, 2, 3))
    tiling = facts(reference.folder)["tiling"]
    tile = tuple(tiling["patch_size"])
    for name in ("big", "flush"):
        if f"in/{name}_frames" not in arrays(reference.folder):
            continue
        frames = reference.input(f"{name}_frames").permute(0, 3, 1, 2)
        size = (frames.shape[2], frames.shape[3])
        corners = flow.grid(size, tile, tiling["min_overlap"])
        cut = torch.stack([frames[:, :, y : y + tile[0], x : x + tile[1]] for y, x in corners])
        flows = model({"frames": cut})["flow"]
        found[f"mid/{name}_grid"] = torch.tensor(corners)
        found[f"mid/{name}_tile_flows"] = flows
        found[f"out/{name}_flow"] = _stitched(dict(zip(corners, flows.float().numpy(), strict=False)), size, tiling)
    return found


def patches(frames: Tensor) -> Tensor:
    """3×3 zero-padded patches (B, 2, H, W, 27) of frames (B, 2, 3, H, W), by our convolution with a kernel that only
    copies: each of its 54 outputs is one value of the patches.
    """
    batch, _, _, height, width = frames.shape
    adapter = FramePairAdapter(FramePairInput(height, width, 54, FourierPositions(1, (height, width))))
    kernel = patches_to_kernel(torch.eye(54, dtype=frames.dtype))
    adapter.features.load_state_dict({"weight": kernel, "bias": torch.zeros(54)})
    values: Tensor = adapter(frames)[..., :54]
    return values.reshape(batch, height, width, 2, 27).permute(0, 3, 1, 2, 4)


def _stitched(flows: Mapping[tuple[int, int], Array], size: tuple[int, int], tiling: Mapping[str, Any]) -> Tensor:
    tile = (tiling["patch_size"][0], tiling["patch_size"][1])
    tiles = flow.tiles(size, tile, tiling["min_overlap"])
    stitched = flow.stitch(flow.Box(0, 0, *size), tile, [(box, times, flows[box[:2]]) for box, times in tiles.items()])
    return torch.from_numpy(stitched).unsqueeze(0)


def _run_video(reference: _Reference) -> dict[str, Tensor]:
    model = reference.model()
    feeds = {"frames": reference.input("images"), "audio": reference.input("audio")}
    with Probe(model) as probe:
        outputs = model(feeds)
    found = {key: value for key, value in probe.values().items() if "decoder" not in key}
    found.update({"out/image": outputs["video"], "out/audio": outputs["sound"], "out/label": outputs["label"]})
    for chunk in range(facts(reference.folder)["num_chunks"]):
        found.update(_run_chunk(reference, model, found["mid/latents"], f"chunk{chunk}"))
    ends = changed(model, with_both_ends)
    with Probe(ends) as probe:
        whole = ends(feeds)
    found.update({key.replace("mid/", "mid/linspace_decode/"): value for key, value in probe.values().items()})
    found["out/linspace_decode/image"] = whole["video"].flatten(1, 3)
    found["out/linspace_decode/audio"] = whole["sound"].flatten(1)
    found["out/linspace_decode/label"] = whole["label"]
    return found


def _run_chunk(reference: _Reference, model: PerceiverIO, latents: Tensor, chunk: str) -> dict[str, Tensor]:
    """Some points of sound and video, and the label."""
    points = {kind: arrays(reference.folder)[f"mid/{chunk}/points_{kind}"] for kind in ("audio", "image")}
    indices = {kind: torch.from_numpy(one).expand(len(latents), -1) for kind, one in points.items()}
    with Probe(model) as probe:
        sound = model.decode("sound", latents, indices["audio"], {})
        video = model.decode("video", latents, indices["image"], {})
        label = model.decode("label", latents, None, {})
    found = {key.replace("mid/", f"mid/{chunk}/"): value for key, value in probe.values().items()}
    out = {"audio": sound.flatten(1), "image": video, "label": label[:, 0]}
    return {**found, **{f"out/{chunk}/{kind}": value for kind, value in out.items()}}


def with_both_ends(config: PerceiverConfig) -> PerceiverConfig:
    """Queries at linspace(-1, 1), as DeepMind's code has them where it does not sample points."""
    assert isinstance(config.decoder, QueryDecoder)
    outputs = dict(config.decoder.outputs)
    for name in ("sound", "video"):
        queries: Any = outputs[name].queries
        queries = replace(queries, positions=replace(queries.positions, endpoint=True))
        outputs[name] = replace(outputs[name], queries=queries)
    return replace(config, decoder=replace(config.decoder, outputs=outputs))


_RUN: dict[str, Callable[[_Reference], dict[str, Tensor]]] = {
    "language": _run_language,
    "imagenet": _run_imagenet,
    "optical": _run_flow,
    "video": _run_video,
}
