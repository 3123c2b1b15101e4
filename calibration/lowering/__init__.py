# SPDX-License-Identifier: Apache-2.0
"""Rewrites of the canonical quantized graph for one target each. They change no number: integer codes stay bit-equal."""
