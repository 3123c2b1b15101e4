# SPDX-License-Identifier: Apache-2.0
"""Hub ids (``deepmind/language-perceiver``): the directory is downloaded once, into Hugging Face's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from perceiver_export.runtimes.errors import CheckpointError, MissingDependencyError

_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*"]


def is_hub_id(text: str) -> bool:
    """Whether this could be ``owner/name``; ``./name`` and ``../name`` are paths."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def download(hub_id: str) -> Path:
    """The directory of a hub id; only configs and weights are fetched, and nothing in them is executed.

    Raises CheckpointError: there is no such model, or no way to the hub; MissingDependencyError.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            f"{hub_id} is no directory, and to download it huggingface_hub is needed",
            "pip install 'perceiver-export[hub]', or give a directory",
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id} is no directory, and cannot be had from the hub: {first_line}",
            f"check the name, or download it elsewhere: hf download {hub_id} --local-dir {hub_id.partition('/')[2]}",
        ) from error
