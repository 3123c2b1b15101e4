# SPDX-License-Identifier: Apache-2.0
"""Recognize the code that wrote a checkpoint by its names, to unwrap them or to say what to give instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from perceiver_export.exporter.checkpoints.huggingface_config import TASKS
from perceiver_export.exporter.checkpoints.weights import read_object
from perceiver_export.runtimes.errors import CheckpointError

# The ends of two tensor names that identify a model of another package.
_OTHERS = {
    "krasserm/perceiver-io": ("0.latent_provider._query", "0.cross_attn_1.1.module.0.weight"),
    "lucidrains/perceiver-pytorch": ("latents", "fn.to_kv.weight"),
}

_MERGE = (
    "merge it into the base model, loaded as in training: "
    "model = PeftModel.from_pretrained({name}.from_pretrained({base}), {adapter}).merge_and_unload(); "
    "model.save_pretrained('merged'); then export merged"
)
_MERGE_ANY = _MERGE.format(name="CLASS", base="BASE", adapter="ADAPTER")
_LATENTS = "embeddings.latents"  # of transformers' PerceiverModel, which its task classes call `perceiver`
# Parts of names that PyTorch's wrappers add: DataParallel, compile, FSDP, checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def refuse_other_packages(directory: Path, names: Collection[str]) -> None:
    """Raise CheckpointError for the state dict of another package's model."""
    for package, telling in _OTHERS.items():
        if all(prefixes(names, name) for name in telling):
            raise CheckpointError(
                f"{directory} holds a model of {package}, not of transformers",
                "build it with that package and export it as your own module: see examples/other_packages.py",
            )


def prefixes(names: Iterable[str], name: str) -> list[str]:
    """The prefixes of ``name`` in ``names``: "" for itself, "module." for ``module.NAME``."""
    return sorted(one.removesuffix(name) for one in names if one == name or one.endswith(f".{name}"))


def unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under transformers' own names, and a note of the removed parts: ``module.``, ``_orig_mod.``, ``model.``.

    Names without ``perceiver.`` are accepted, as in transformers. Raises CheckpointError: several models, or an adapter
    that was not merged.
    """
    if adapter := next((name for name in state if "lora_" in name or ".base_layer." in name), None):
        raise CheckpointError(f"the checkpoint holds an unmerged PEFT adapter: {adapter!r}", _MERGE_ANY)
    parts = [part for part in _WRAPPERS if any(part in name.split(".") for name in state)]
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in state}
    starts = prefixes(names.values(), _LATENTS)
    start = starts[0] if starts else "perceiver."
    outer = start.removesuffix("perceiver.")
    unwrapped = {name: named.removeprefix(outer) for name, named in names.items()}
    if outer == start:  # a bare PerceiverModel; the head of a language model lies outside of it
        unwrapped = {
            name: own if own.startswith("embedding_decoder.") else f"perceiver.{own}" for name, own in unwrapped.items()
        }
    if len(starts) > 1 or len(set(unwrapped.values())) < len(names):
        raise CheckpointError(
            f"the checkpoint holds more than one model: {', '.join(starts)}", "save the state dict of one of them"
        )
    taken_off = [*(f"{part}." for part in parts), *([outer] if outer else [])]
    notes = (f"removed from the names of the weights: {' and '.join(taken_off)}",) if taken_off else ()
    return {unwrapped[name]: tensor for name, tensor in state.items()}, notes


def refuse_other_directories(directory: Path) -> None:
    """Raise CheckpointError for a PEFT adapter, and for a training output that holds only checkpoints."""
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        settings = read_object(adapter, "the adapter's settings")
        base = repr(settings.get("base_model_name_or_path") or "BASE")
        mapping = settings.get("auto_mapping")
        name = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
        raise CheckpointError(
            f"{directory} holds a PEFT adapter, which needs its base model {base}",
            _MERGE.format(name=name if name in TASKS else "CLASS", base=base, adapter=repr(str(directory))),
        )
    numbers = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in directory.glob("checkpoint-*/")]
    found = sorted((int(match[1]) for match in numbers if match), reverse=True)
    if found and not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is a training output: it holds {len(found)} checkpoints but no final model",
            f"give one of them: the newest is {directory / f'checkpoint-{found[0]}'}",
        )
