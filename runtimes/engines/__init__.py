# SPDX-License-Identifier: Apache-2.0
"""Engines: one file per backend, the table of targets, and the cache of compiled engines."""
