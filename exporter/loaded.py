# SPDX-License-Identifier: Apache-2.0
"""`LoadedModel`: a model ready for export, with its description for the bundle."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from perceiver_export.runtimes.bundle import sha256
from perceiver_export.runtimes.errors import UsageError, check_kind
from perceiver_export.runtimes.manifest import OutputKind
from perceiver_export.runtimes.preprocessing import Preprocessing
from perceiver_export.runtimes.runtime import Array

if TYPE_CHECKING:
    from perceiver_export.exporter.model.architectures import Parity
    from perceiver_export.exporter.model.perceiver import PerceiverIO


OWN_SOURCE = "your own code"


def texts(what: str, value: object) -> tuple[str, ...]:
    """``value`` as a tuple. Raises UsageError unless it holds strings; one string would become its letters."""
    found = (None,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(one, str) for one in found):
        raise UsageError(f"{what} cannot be {reprlib.repr(value)}", f"give a tuple of strings: {what}=('a', 'b')")
    return found


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its description for the bundle.

    ``config`` is None unless the model is a `PerceiverIO`. ``parity``: the code whose numerics it follows, or ``own``.
    ``split``: whether encoder and decoder are separate graphs by default. ``output_kinds``: the meaning of outputs, by
    name, where it differs from the task's default. ``files``: contents of further files, by name.
    """

    model: Any  # PerceiverIO, or without config NamedModule or OnnxFile
    config: Any  # PerceiverConfig or None
    task: str
    parity: Parity | Literal["own"]
    source: str
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    split: bool = False
    notes: tuple[str, ...] = ()
    output_kinds: Mapping[str, OutputKind] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kind("task", self.task, str, "the name of a task")
        steps = "None, or one of the classes of perceiver_export.runtimes.preprocessing"
        check_kind("preprocessing", self.preprocessing, (type(None), *get_args(Preprocessing)), steps)
        check_kind("output_kinds", self.output_kinds, Mapping, "{name of an output: its kind}")

    @classmethod
    def own(
        cls,
        model: PerceiverIO,
        task: str = "arrays",
        *,
        labels: Sequence[str] = (),
        preprocessing: Preprocessing | None = None,
        output_kinds: Mapping[str, OutputKind] | None = None,
        split: bool = False,
        notes: Sequence[str] = (),
    ) -> LoadedModel:
        """A model of your own, for any task. An image classifier, for example, has ``preprocessing``, the steps from an
        image to its input, and ``labels``, the names of its scores in order.

        ``output_kinds`` gives the meaning of outputs, by name: ``single-label`` (softmax), ``multi-label`` (sigmoid),
        ``regression``, or ``none``. Commands and gates follow it. By default, a classifier's only output is
        ``single-label`` (a sound classifier's is ``multi-label``).
        """
        from perceiver_export.exporter.model.perceiver import PerceiverIO

        check_kind("the model", model, PerceiverIO, "a PerceiverIO, or any other module as OwnModel(module, inputs)")
        given = texts("labels", labels), preprocessing, split, texts("notes", notes), output_kinds or {}
        return cls(model.eval(), model.config, task, "own", OWN_SOURCE, *given)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the source itself, as a reference: preprocessed inputs by name -> all outputs by name."""
        if self.config is None:
            run: Callable[..., dict[str, Array]] = getattr(self.model, "run_samples", self.model.run)
            return run(feeds)
        import torch

        with torch.inference_mode():
            outputs = self.model({name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: output.numpy() for name, output in outputs.items()}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the torch weights, or of the ONNX file."""
        from perceiver_export.exporter.onnx_files import OnnxFile

        if isinstance(self.model, OnnxFile):
            return {self.model.path.name: sha256(self.model.path)}
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if not hasattr(tensor, "shape"):
                continue  # extra state, which can be of any type
            array = tensor.cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.data)
        return {"tensors in torch": digest.hexdigest()}
