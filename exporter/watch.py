# SPDX-License-Identifier: Apache-2.0
"""What a module computes with, found in one call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_CONSTANT = ("ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty")
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Watch(TorchDispatchMode):
    """Within it, ``sizes`` collects the sizes of tensors and the integers that operators take; ``reads`` becomes true
    where Python reads a number that depends on ``inputs``, as a branch or `.item()` does.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: set[int] = set()
        self.reads = False
        self._dependent = WeakTensorKeyDictionary(dict.fromkeys(inputs))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        given, made = tree_leaves((args, kwargs)), [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        self.sizes.update(one for one in given if isinstance(one, int))
        self.sizes.update(size for tensor in made for size in tensor.shape)
        if any(isinstance(one, Tensor) and one in self._dependent for one in given):
            self.reads = self.reads or function in _READS
            if function.overloadpacket.__name__ not in _CONSTANT:
                self._dependent.update(dict.fromkeys(made))
        return found


def watched(function: Callable[..., Any], inputs: Iterable[Tensor]) -> Watch:
    """A call of ``function``; of one that fails, what it did until then."""
    given = list(inputs)
    watch = Watch(given)
    try:
        with torch.no_grad(), watch:
            function(*given)
    except Exception:  # the user's own code, whose error tracing reports
        pass
    return watch
