# SPDX-License-Identifier: Apache-2.0
"""Compare a bundle with a reference: metrics, exact bounds, gates, certificates."""
