# SPDX-License-Identifier: Apache-2.0
"""Models that nobody wrote for this project: what `export` makes of them."""
