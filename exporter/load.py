# SPDX-License-Identifier: Apache-2.0
"""SOURCE -> torch model, whatever it is a checkpoint of."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from perceiver_export.exporter.checkpoints.preprocessor import MAX_SIDE
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.runtimes.errors import CheckpointError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from perceiver_export.exporter.perceiver.architectures import Parity

_PARITIES = ("huggingface", "deepmind")


def load_model(
    source: str | os.PathLike[str],
    *,
    task: str | None = None,
    parity: str | None = None,
    shape: Mapping[str, tuple[int, ...]] | None = None,
    config: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a checkpoint for export. ``source`` is one of

    - a Hugging Face directory, or a hub id (``owner/name``), which is downloaded,
    - ``deepmind:TASK:FILE``, a Haiku pickle, and with ``config`` a JSON file of the sizes that it differs in,
    - ``lucidrains:FILE``, a state dict, with ``config`` the JSON file of its model's arguments,
    - ``krasserm:DIRECTORY``, or ``krasserm:FILE``, a state dict, with ``config`` its model's config.json,
    - ``preset:NAME``, random weights at a paper's sizes,
    - ``module:function``, your own: a function that gives a `PerceiverIO` or a `LoadedModel`.

    ``parity`` says whose numerics to follow; by default those of the code that trained the checkpoint. ``shape`` maps
    an input's name to its size without the batch, e.g. ``{"image": (3, 224, 224)}``. ``task`` is only checked against
    what the checkpoint is, but for one's own model, of which it tells.

    Raises CheckpointError, UnsupportedModelError, UsageError, MissingDependencyError.
    """
    _need_torch()
    if parity not in (None, *_PARITIES):
        raise UsageError(f"there is no parity {parity!r}", f"it is one of {', '.join(_PARITIES)}")
    loaded = _load(os.fspath(source), task, _parity(parity), _image_shape(shape or {}), config)
    if task is not None and task != loaded.task:
        raise UsageError(f"{source} is a model of {loaded.task}, not of {task}", "leave --task out")
    return loaded


def _load(
    text: str,
    task: str | None,
    parity: Parity | None,
    image_shape: tuple[int, int, int] | None,
    config: str | os.PathLike[str] | None,
) -> LoadedModel:
    kind, _, rest = text.partition(":")
    sizes = None if config is None else Path(config)
    if kind == "preset":
        from perceiver_export.exporter.presets import load_preset

        _refuse("a preset", config=config)
        return load_preset(rest, parity or "deepmind", image_shape)
    if kind == "deepmind":
        from perceiver_export.exporter.checkpoints.haiku import load_haiku

        return load_haiku(rest, parity or "deepmind", sizes, image_shape)
    if kind in ("krasserm", "lucidrains"):
        return _load_foreign(kind, Path(rest), sizes, parity, image_shape)
    if re.fullmatch(r"[\w.]+:\w+", text) and not Path(text).exists():
        from perceiver_export.exporter.own import load_own

        _refuse("a model of your own", parity=parity, shape=image_shape, config=config)
        return load_own(text, task)
    _refuse("a Hugging Face directory", config=config)
    return _load_directory(text, parity or "huggingface", image_shape)


def _refuse(what: str, **options: object) -> None:
    """What would be ignored is refused."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{what} takes no --{name}", f"leave --{name} out")


def _load_foreign(
    kind: str, source: Path, config: Path | None, parity: str | None, image_shape: tuple[int, int, int] | None
) -> LoadedModel:
    if image_shape is not None:
        raise UsageError(
            f"the sizes of a model of {kind} are those that its config says", "leave --shape out, edit the config"
        )
    own = "huggingface" if kind == "krasserm" else None
    if parity not in (None, own):
        raise UsageError(f"models of {kind} have no numerics but their own", "leave --parity out")
    if kind == "krasserm":
        from perceiver_export.exporter.checkpoints.krasserm import load_krasserm

        return load_krasserm(source, config)
    if config is None:
        raise UsageError(
            "a state dict of lucidrains does not say its sizes", "give the arguments of its model: --config FILE.json"
        )
    from perceiver_export.exporter.checkpoints.lucidrains import load_lucidrains

    return load_lucidrains(source, config)


def _load_directory(text: str, parity: Parity, image_shape: tuple[int, int, int] | None) -> LoadedModel:
    from perceiver_export.exporter.checkpoints.hub import download, is_hub_id
    from perceiver_export.exporter.checkpoints.huggingface import load_huggingface

    directory = Path(text)  # `./owner/name` loses what says that it is no hub id
    if not directory.exists() and is_hub_id(text):
        loaded = load_huggingface(download(text), parity, image_shape)
        return dataclasses.replace(loaded, source=text)  # not the cache's name for it
    if not directory.is_dir():
        raise CheckpointError(
            f"{text} {'is not a directory' if directory.exists() else 'does not exist'}",
            "give a Hugging Face directory (config.json and weights) or another SOURCE: export --help lists them",
        )
    return load_huggingface(directory, parity, image_shape)


def _parity(parity: str | None) -> Parity | None:
    return "deepmind" if parity == "deepmind" else "huggingface" if parity == "huggingface" else None


def _image_shape(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    for name in shape:
        if name != "image":
            raise UsageError(
                f"the size of {name!r} cannot be chosen", "`image` can, of picture models: --shape image=3x224x224"
            )
    if "image" not in shape:
        return None
    sizes = shape["image"]
    if len(sizes) != 3 or not 1 <= min(sizes) <= max(sizes) <= MAX_SIDE:
        raise UsageError(
            f"the shape of `image` is {list(sizes)}", "give channels, height, width: --shape image=3x224x224"
        )
    return sizes[0], sizes[1], sizes[2]


def _need_torch() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"export needs {error.name}, which is not installed", "pip install 'perceiver-export[export]'"
        ) from error
