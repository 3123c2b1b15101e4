# SPDX-License-Identifier: Apache-2.0
"""Our own Perceiver IO in PyTorch: `config` (sizes), `model` (the network) and the parts that it is made of."""
