# SPDX-License-Identifier: Apache-2.0
"""Quantize a bundle: observe, smooth, choose integers, write, and check that integer kernels run them."""
