# SPDX-License-Identifier: Apache-2.0
"""Judge a bundle beside a reference: metrics, exact bounds, gates, certificates."""
