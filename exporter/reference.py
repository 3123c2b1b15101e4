# SPDX-License-Identifier: Apache-2.0
"""The checkpoint in torch as what a bundle is held against, with hashes that tell which checkpoint it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_export.exporter.load import load_model
from perceiver_export.runtimes.bundle import read_manifest, sha256
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.machine import cpu_name
from perceiver_export.runtimes.preprocessing import ImagePreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds

if TYPE_CHECKING:
    from perceiver_export.exporter.loaded import LoadedModel

_KINDS = ("deepmind:", "lucidrains:", "krasserm:")
_AS_THEY_ARE = r"(lucidrains|krasserm):|(?!preset:)[\w.]+:\w+$"  # whose sizes and numerics cannot be chosen
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model*.safetensors", "pytorch_model*.bin")  # as they are read


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that runs in torch: inputs (n, ...) by name -> outputs (n, ...) by name.

    ``described`` has the SHA-256 of its weights, by file (``graphs``), and torch's version.
    """

    name: str
    model: LoadedModel
    described: Mapping[str, Any]

    def __call__(self, feeds: Feeds) -> Mapping[str, Array]:
        return self.model.run(feeds)


def load_reference(bundle: str | Path, source: str) -> Checkpoint:
    """SOURCE, as `load_model` takes it, as a reference for a bundle that was exported from it: with the bundle's
    numerics and sizes.

    Raises UsageError where it is not of the bundle's task, labels or preprocessing, and what `load_model` raises.
    """
    manifest = read_manifest(Path(bundle))
    steps = manifest.preprocessing
    options: dict[str, Any] = {}
    if not re.match(_AS_THEY_ARE, source):
        options["parity"] = None if manifest.parity == "own" else manifest.parity
        if isinstance(steps, ImagePreprocessing):
            options["shape"] = {"image": (3, steps.height, steps.width)}
    try:
        loaded = load_model(source, **options)
    except UsageError as error:
        if "--" not in error.hint:
            raise
        # The hint is about options of `export`, which nobody typed here.
        hint = "give the checkpoint that it was exported from; or export this one by itself: --against BUNDLE"
        raise UsageError(f"{source} is no reference for {bundle}: {error.message}", hint) from error
    if (loaded.task, loaded.labels, loaded.preprocessing) != (manifest.task, manifest.labels, manifest.preprocessing):
        raise UsageError(
            f"{source} prepares its inputs differently from {bundle}, or has another task or other labels",
            "give the checkpoint that the bundle was exported from",
        )
    import torch

    described = {
        "target": "torch",
        "device": cpu_name(),
        "engine": "torch",
        "version": str(torch.__version__),
        "graphs": _hashes(source, loaded),
    }
    return Checkpoint(Path(source).name or source, loaded, described)


def _hashes(source: str, loaded: LoadedModel) -> dict[str, str]:
    """SHA-256 of the files of weights; where SOURCE is no file here (a hub id, one's own code), of what was loaded."""
    path = Path(source.rpartition(":")[2] if source.startswith(_KINDS) else source)
    for files in ([path], *(sorted(path.glob(pattern)) for pattern in _WEIGHTS)):
        if files and files[0].is_file():
            return {file.name: sha256(file) for file in files}
    digest = hashlib.sha256()
    for name, tensor in sorted(loaded.model.state_dict().items()):
        array = tensor.cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return {"tensors in torch": digest.hexdigest()}
