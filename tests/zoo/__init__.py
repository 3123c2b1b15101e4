# SPDX-License-Identifier: Apache-2.0
"""Models of other packages, and three in plain torch: what `export` makes of them."""
