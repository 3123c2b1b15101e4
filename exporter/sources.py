# SPDX-License-Identifier: Apache-2.0
"""`load_model` makes a `LoadedModel` of any SOURCE; `load_reference` makes it a reference to validate against.

A function of your own, ``module:function``, returns a `PerceiverIO`, for a bundle of arrays, or a `LoadedModel`::

    def defects() -> LoadedModel:
        model = PerceiverIO(config)  # one input `image`, one output with a score per label
        model.load_state_dict(...)
        return LoadedModel.own(
            model, "image-classification", labels=("scratch", "dent"), preprocessing=ImagePreprocessing(...),
            output_kinds={"logits": "multi-label"},  # an image may show both
        )

Then `run` prints labels, and `validate` measures the share of correct answers. ``output_kinds`` may also name an output
of a bundle of arrays, which `validate` then compares with ``labels`` in the data.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from perceiver_export.calibration.data.sources import current_directory_importable, find_function
from perceiver_export.exporter.checkpoints import tokenizer
from perceiver_export.exporter.loaded import OWN_SOURCE, LoadedModel, texts
from perceiver_export.runtimes.bundle import read_manifest, sha256
from perceiver_export.runtimes.errors import (
    CheckpointError,
    MissingDependencyError,
    PerceiverExportError,
    UnsupportedModelError,
    UsageError,
    check_choice,
    check_kind,
    first_line,
    install_command,
    require,
)
from perceiver_export.runtimes.files import read_json
from perceiver_export.runtimes.machine import cpu_name
from perceiver_export.runtimes.manifest import OutputKind, TensorSpec, interface
from perceiver_export.runtimes.preprocessing import MAX_SIDE, ImagePreprocessing, Preprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks import TASKS

if TYPE_CHECKING:
    from perceiver_export.exporter.model.architectures import Parity
    from perceiver_export.exporter.own import OwnModel

_PARITIES: tuple[Parity, ...] = ("huggingface", "deepmind")
_REQUIRED = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors")
_SOURCES = "a path, a Hub id, preset:NAME, module:function, or OwnModel(module, {'x': example}) around a module"
_BARE = ("arrays", "sets")  # tasks that need nothing but the model
_FILES = [  # downloaded, never executed
    *("*config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*"),
    *tokenizer.FILES,
]


def load_model(
    source: str | os.PathLike[str],
    *,
    task: str | None = None,
    parity: str | None = None,
    shape: Mapping[str, tuple[int, ...]] | None = None,
    config: str | os.PathLike[str] | None = None,
    like: str | os.PathLike[str] | None = None,
    use_transformers: bool = False,
) -> LoadedModel:
    """Load a checkpoint for export. ``source`` is one of

    - a Hugging Face directory, or a hub id (``owner/name``), which is downloaded,
    - ``deepmind:TASK:FILE``, a Haiku pickle; ``config`` is a JSON file of sizes that differ from the released model's,
    - ``preset:NAME``, random weights at a paper's sizes,
    - ``module:function``, a function of your own, which returns any torch module with example inputs (as a pair or an
      `OwnModel`), a `PerceiverIO`, or a `LoadedModel`,
    - ``FILE.onnx``, from any exporter; ``config`` is a JSON file of its task, labels, preprocessing and output_kinds,
      or ``like`` is a bundle to take them from.

    ``parity`` says whose numerics to follow; by default those of the code that trained the checkpoint. ``shape`` maps
    an input's name to its size without the batch, e.g. ``{"image": (3, 224, 224)}``. ``task`` sets the task of your own
    bare model; for any other model it must equal the model's. ``use_transformers`` loads a Hugging Face directory of
    any class with the installed transformers, which never runs code of the checkpoint.

    Raises CheckpointError, UnsupportedModelError, UsageError, MissingDependencyError.
    """
    check_installed()
    check_kind("the source", source, (str, os.PathLike), _SOURCES)
    if parity is not None:
        check_choice("--parity", parity, _PARITIES)
    sizes = None if config is None else Path(config)
    path = Path(source)
    if path.suffix == ".onnx" and path.is_file():
        _refuse("an ONNX file", parity=parity, use_transformers=use_transformers or None)
        loaded = load_onnx_file(path, shape or {}, sizes, None if like is None else Path(like), task)
    elif use_transformers:
        _refuse("a class of transformers", parity=parity, config=config, like=like)
        loaded = _load_installed(os.fspath(source), task, shape or {})
    else:
        _refuse("this source", like=like)
        loaded = _load(os.fspath(source), task, cast("Parity | None", parity), shape or {}, sizes)
    if task is not None and task != loaded.task:
        own = f"set the task in the function: LoadedModel.own(model, {task!r}, labels=…, preprocessing=…)"
        hint = own if loaded.parity == "own" else "leave --task out"
        raise UsageError(f"{source} is a model of {loaded.task}, not of {task}", hint)
    return loaded


def check_installed() -> None:
    """Raise MissingDependencyError if a library that export needs is not installed."""
    for name in _REQUIRED:
        require(name, "export", "export")


def _load(
    text: str, task: str | None, parity: Parity | None, shape: Mapping[str, tuple[int, ...]], config: Path | None
) -> LoadedModel:
    from perceiver_export.exporter.checkpoints import haiku, huggingface
    from perceiver_export.exporter.presets import load_preset

    kind, _, rest = text.partition(":")
    if kind not in ("preset", "deepmind") and re.fullmatch(r"[\w.]+:\w+", text) and not Path(text).exists():
        _refuse("a model of your own", parity=parity, config=config)
        return _of_its_sizes(load_own(text, task), shape)
    image = _image_shape(shape)
    if kind == "preset":
        _refuse("a preset", config=config)
        return load_preset(rest, parity or "deepmind", image)
    if kind == "deepmind":
        return haiku.load_haiku(rest, parity or "deepmind", config, image)
    _refuse("a Hugging Face directory", config=config)
    directory, name = _directory(text)
    return dataclasses.replace(huggingface.load_huggingface(directory, parity or "huggingface", image), source=name)


def _load_installed(text: str, task: str | None, shape: Mapping[str, tuple[int, ...]]) -> LoadedModel:
    from perceiver_export.exporter.checkpoints.installed import load_installed

    directory, name = _directory(text)
    own, notes = load_installed(directory, task, shape)
    return dataclasses.replace(loaded_module(own, name), notes=notes)


def _directory(text: str) -> tuple[Path, str]:
    """A Hugging Face directory and its name; a hub id is downloaded. Raises CheckpointError."""
    directory = Path(text)  # drops the `./` of `./owner/name`, which is no hub id
    if not directory.exists() and is_hub_id(text):
        return download(text), text  # not the name of its cache directory
    if directory.is_file() and directory.suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
        beside = (directory.parent / "config.json").is_file()
        own = "write a function that returns the module with these weights and example inputs; export module:function"
        hint = f"export {directory.parent}, which has its config.json" if beside else own
        raise CheckpointError(f"{text} is not a model: {directory.suffix} files hold weights only", hint)
    if not directory.exists() and directory.suffix == ".onnx":
        raise CheckpointError(f"{text} does not exist", "check the path")
    if not directory.is_dir():
        raise CheckpointError(
            f"{text} {'is not a directory' if directory.exists() else 'does not exist'}",
            "give a Hugging Face directory (config.json and weights) or another SOURCE: export --help lists them",
        )
    return directory, directory.resolve().name


def _refuse(what: str, **options: object) -> None:
    """Refuse options that would have no effect."""
    for name, value in options.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{what} takes no {option}", f"leave {option} out")


def _image_shape(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    for name, sizes in shape.items():
        if name != "image":
            hint = "give only the size of `image`, for image models: --shape image=3x224x224"
            raise UsageError(f"the size of {name!r} is fixed", hint)
        if len(sizes) != 3 or not 1 <= min(sizes) <= max(sizes) <= MAX_SIDE:
            hint = "give channels, height, width: --shape image=3x224x224"
            raise UsageError(f"the shape of `image` is {list(sizes)}", hint)
        return sizes[0], sizes[1], sizes[2]
    return None


def _of_its_sizes(loaded: LoadedModel, shape: Mapping[str, tuple[int, ...]]) -> LoadedModel:
    """A model of your own; refuses ``shape``, since its sizes cannot be chosen."""
    own = loaded.config is None
    names = list(getattr(loaded.model, "examples", ()) if own else loaded.config.inputs)
    for name in shape:
        if name not in names:
            raise UsageError(f"there is no input {name!r}; the inputs are {', '.join(names)}", "leave --shape out")
        whose, hint = ("example inputs", "return other example inputs") if own else ("model", "return another model")
        raise UsageError(f"the size of {name!r} is set by your {whose}", hint)
    return loaded


def load_own(spec: str, task: str | None) -> LoadedModel:
    """Call ``module:function``, imported from the current directory, and describe the model that it returns.

    A bare `PerceiverIO` becomes a bundle of ``task``, by default ``arrays``: arrays in, arrays out.

    Raises UsageError if the function cannot be imported, needs arguments or fails, or if ``task`` needs more than a
    bare model; UnsupportedModelError if it returns something else.
    """
    from torch import nn

    from perceiver_export.exporter.model.perceiver import PerceiverIO
    from perceiver_export.exporter.own import OwnModel

    made = _call(spec)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made = OwnModel(made[0], made[1], task=task or "arrays")
    if isinstance(made, OwnModel):
        return loaded_module(made, spec)
    if isinstance(made, LoadedModel):
        return dataclasses.replace(made, source=spec) if made.source == OWN_SOURCE else made
    if not isinstance(made, PerceiverIO):
        kind = type(made).__name__
        hint = "return (module, {'name of an argument': example tensor}), or an OwnModel: see examples/your_own.py"
        raise UnsupportedModelError(f"{spec} returned a {kind}, which does not describe its inputs", hint)
    if task not in (None, *_BARE):
        check_choice("--task", task, tuple(TASKS))
        raise UsageError(
            f"{spec} returns a bare model, without the preprocessing and labels of {task}",
            f"return LoadedModel.own(model, {task!r}, labels=…, preprocessing=…): see examples/your_own.py",
        )
    return dataclasses.replace(LoadedModel.own(made, task or "arrays"), source=spec)


def loaded_module(own: OwnModel, source: str = OWN_SOURCE) -> LoadedModel:
    """Any module with example inputs, as a model to export."""
    from perceiver_export.exporter.own import NamedModule

    model = NamedModule(own.module, own.inputs, own.outputs)
    kinds, labels = own.output_kinds, texts("labels", own.labels)
    return LoadedModel(model, None, own.task, "own", source, labels, own.preprocessing, output_kinds=kinds)


class OnnxDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The description of an ONNX file in its bundle: the JSON of ``--config``."""

    task: str = "arrays"
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    output_kinds: dict[str, OutputKind] = {}


def load_onnx_file(
    path: Path, shape: Mapping[str, tuple[int, ...]], config: Path | None, like: Path | None, task: str | None
) -> LoadedModel:
    """An ONNX file as a model; task, labels and preprocessing are those of ``config``, or of the bundle ``like``.

    Raises CheckpointError, UnsupportedModelError, UsageError, BundleError.
    """
    from perceiver_export.exporter.onnx_files import OnnxFile

    if config is not None and like is not None:
        raise UsageError("--config and --like both describe the model", "give one of them")
    said = OnnxDescription(task or "arrays") if config is None else read_json(config, OnnxDescription)
    if like is not None:
        manifest = read_manifest(like)
        said = OnnxDescription(manifest.task, manifest.labels, manifest.preprocessing, dict(manifest.output_kinds))
    model = OnnxFile(path, shape)
    kinds = said.output_kinds
    return LoadedModel(model, None, said.task, "own", path.name, said.labels, said.preprocessing, output_kinds=kinds)


def _call(spec: str) -> object:
    with current_directory_importable():
        factory = find_function(spec)
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise UsageError(f"{spec} needs arguments: {error}", "give a function without arguments") from error
        try:
            made: object = factory()
        except PerceiverExportError:
            raise
        except (Exception, SystemExit) as error:
            module, _, name = spec.partition(":")
            hint = f'run python -c "import {module}; {module}.{name}()" to see where'
            raise UsageError(f"{spec} failed: {error!r}", hint) from error
    return made


def is_hub_id(text: str) -> bool:
    """Whether this can be ``owner/name``; ``./name`` and ``../name`` are paths."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def download(hub_id: str) -> Path:
    """The directory of a hub id, downloaded once into Hugging Face's own cache. Nothing in it is executed.

    Raises CheckpointError if there is no such model or no connection; MissingDependencyError.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            f"{hub_id} is not a directory, and downloading it needs huggingface_hub",
            f"{install_command('hub')}; or give a directory",
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id} is not a directory and cannot be downloaded: {first_line(error)}",
            f"check the name, or download it elsewhere: hf download {hub_id} --local-dir {hub_id.partition('/')[2]}",
        ) from error


_AS_THEY_ARE = r"(?!preset:)[\w.]+:\w+$"  # sources whose sizes and numerics cannot be chosen
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model*.safetensors", "pytorch_model*.bin")  # in reading order


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that runs in torch: inputs (n, ...) by name -> outputs (n, ...) by name.

    ``described`` has the SHA-256 of its weights, by file (``graphs``), and torch's version.
    """

    name: str
    model: LoadedModel
    described: Mapping[str, Any]

    def __call__(self, feeds: Feeds) -> Mapping[str, Array]:
        """The outputs of the checkpoint by name."""
        return self.model.run(feeds)


def load_reference(bundle: str | Path, source: str) -> Checkpoint:
    """Load SOURCE as the reference of a bundle that was exported from it, with the bundle's numerics and sizes.

    SOURCE is any that `load_model` takes. Raises UsageError if its task, labels or preprocessing differ from the
    bundle's, and what `load_model` raises.
    """
    if ":" not in source and not Path(source).exists() and not is_hub_id(source):
        raise UsageError(f"the reference {source} does not exist", "give the directory of a bundle, or its checkpoint")
    manifest = read_manifest(Path(bundle))
    steps = manifest.preprocessing
    options: dict[str, Any] = {}
    if source.endswith(".onnx"):
        options["like"] = bundle
        options["shape"] = {spec.name: _least(spec) for spec in interface(manifest)[0]}
    elif (Path(source).is_dir() or is_hub_id(source)) and manifest.parity == "own" and not manifest.architecture:
        shape = {spec.name: spec.shape[1:] for spec in interface(manifest)[0]}
        options = {"use_transformers": True, "task": manifest.task, "shape": shape}
    elif not re.match(_AS_THEY_ARE, source):
        options["parity"] = None if manifest.parity == "own" else manifest.parity
        if isinstance(steps, ImagePreprocessing):
            options["shape"] = {"image": (3, steps.height, steps.width)}
    try:
        loaded = load_model(source, **options)
    except UsageError as error:
        if "--" not in error.hint:
            raise
        # The hint is about options of `export`, which nobody typed here.
        hint = "give the checkpoint that it was exported from; or export this one and compare: --against BUNDLE"
        raise UsageError(f"{source} cannot be the reference of {bundle}: {error.message}", hint) from error
    if (loaded.task, loaded.labels, loaded.preprocessing) != (manifest.task, manifest.labels, manifest.preprocessing):
        raise UsageError(
            f"{source} prepares its inputs differently from {bundle}, or has another task or other labels",
            "give the checkpoint that the bundle was exported from",
        )
    import torch

    described: dict[str, Any] = {"target": "torch", "device": cpu_name(), "engine": "torch"}
    described |= {"version": str(torch.__version__), "graphs": _hashes(source, loaded)}
    return Checkpoint(Path(source).name or source, loaded, described)


def _least(spec: TensorSpec) -> tuple[int, ...]:
    """The smallest shape of an input."""
    return tuple(spec.ranges[size][0] if isinstance(size, str) else size for size in spec.shape)


def _hashes(source: str, loaded: LoadedModel) -> dict[str, str]:
    """SHA-256 of the weight files; if SOURCE is no local file (a hub id, your own code), of the loaded weights."""
    path = Path(source.rpartition(":")[2] if source.startswith("deepmind:") else source)
    for files in ([path], *(sorted(path.glob(pattern)) for pattern in _WEIGHTS)):
        if files and files[0].is_file():
            return {file.name: sha256(file) for file in files}
    return loaded.hashes()
