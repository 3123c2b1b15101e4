# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a text are hidden from a masked language model when it is judged."""

from __future__ import annotations

import zlib

import numpy as np

from perceiver_export.runtimes.byte_tokenizer import FIRST_BYTE, MASK
from perceiver_export.runtimes.runtime import Array

_SHARE = 0.15  # as in training (Devlin et al. 2019; Perceiver IO, section 4.1)


def mask_tokens(tokens: Array, tokens_mask: Array) -> tuple[Array, Array]:
    """``tokens`` (length,) with 15 % of its bytes masked, at least one; and the hidden tokens, -1 elsewhere.

    The choice is a function of the text, so every model, run and machine hides the same bytes. Tokens that are masked
    already stay so, and are not judged, for nothing says what they are.
    """
    hidden = np.full(tokens.shape, -1, np.int64)
    candidates = np.flatnonzero((tokens >= FIRST_BYTE) & (tokens_mask == 1))
    if not len(candidates):
        return tokens, hidden
    generator = np.random.default_rng(zlib.crc32(tokens.astype("<i4").tobytes()))
    chosen = generator.choice(candidates, max(1, round(_SHARE * len(candidates))), replace=False)
    masked = tokens.copy()
    hidden[chosen], masked[chosen] = tokens[chosen], MASK
    return masked, hidden
