# SPDX-License-Identifier: Apache-2.0
"""Rewrites of the canonical graph, one file per target. Rewrites of a quantized graph keep all its integers."""
