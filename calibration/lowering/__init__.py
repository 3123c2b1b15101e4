# SPDX-License-Identifier: Apache-2.0
"""Rewrites of the canonical graph, one file a target; those of a quantized one keep every integer code."""
