# SPDX-License-Identifier: Apache-2.0
"""Graphs as files: one .onnx a part, and one model.weights beside them in which each distinct array is stored once."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

WEIGHTS = "model.weights"
_SMALLEST = 256  # bytes; smaller arrays stay in the graph


def save_graphs(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write each graph under its file name. Encoder and decoders share the weights that they have in common.

    Weights lie outside the graphs: an engine then maps them instead of holding them twice.
    """
    stored: dict[str, ir.TensorProtocol] = {}
    places: list[tuple[ir.Value, str]] = []
    for model in models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _SMALLEST:
                continue
            digest = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes()).hexdigest()
            stored.setdefault(digest, tensor)
            places.append((value, digest))
    external = ir.external_data.convert_tensors_to_external(list(stored.values()), directory, WEIGHTS)
    _check_whole(external, directory)
    by_digest = dict(zip(stored, external, strict=True))
    for value, digest in places:
        value.const_value = by_digest[digest]
    for file, model in models.items():
        model.producer_name = "perceiver-export"
        model.producer_version = importlib.metadata.version("perceiver-export")
        ir.save(model, directory / file)


def _check_whole(tensors: Sequence[ir.TensorProtocol], directory: Path) -> None:
    """Raise OSError where the disk was full at the last bytes: onnx-ir does not look at how many were taken."""
    ends = [(one.offset or 0) + (one.length or 0) for one in tensors if isinstance(one, ir.ExternalTensor)]
    if ends and (directory / WEIGHTS).stat().st_size < max(ends):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
