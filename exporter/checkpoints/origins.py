# SPDX-License-Identifier: Apache-2.0
"""Whose code wrote a state dict, by the names in it: to tell a person who names the wrong one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from perceiver_export.runtimes.errors import CheckpointError

# How two of its tensors are called, whatever module they are in.
_TELLING = {
    "krasserm": ("0.latent_provider._query", "0.cross_attn_1.1.module.0.weight"),
    "lucidrains": ("latents", "fn.to_kv.weight"),
    "huggingface": ("embeddings.latents", "attention.self.query.weight"),
}
_HINTS = {
    "krasserm": "it is a checkpoint of krasserm/perceiver-io: give krasserm:{path}",
    "lucidrains": "it is a checkpoint of lucidrains/perceiver-pytorch: give lucidrains:{path}",
    "huggingface": "it is a checkpoint of transformers: give its directory, without a name before it",
}


def check_origin(path: Path, names: Collection[str], expected: str) -> None:
    """Raise CheckpointError where a state dict holds nothing of the model that is ``expected``."""
    if not _of(names, expected):
        found = next((origin for origin in _TELLING if _of(names, origin)), None)
        shown = ", ".join(sorted(names)[:3]) or "none"
        raise CheckpointError(
            f"{path} holds no model of {expected}: the first of its {len(names)} tensors are {shown}",
            _HINTS[found].format(path=path) if found else "give the state dict of the model: model.state_dict()",
        )


def prefixes(names: Iterable[str], name: str) -> list[str]:
    """What stands before ``name``, as a whole part, in ``names``: "" for itself, "module." for ``module.NAME``."""
    return sorted(one.removesuffix(name) for one in names if one == name or one.endswith(f".{name}"))


def _of(names: Collection[str], origin: str) -> bool:
    return all(prefixes(names, name) for name in _TELLING[origin])
