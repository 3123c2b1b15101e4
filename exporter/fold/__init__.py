# SPDX-License-Identifier: Apache-2.0
"""Exact folds of any ONNX graph: the same function with less work.

The folds look for no model and no attention pattern. Each re-associates one matrix product:

- `normalize`: one form for equivalent operators (Gemm, Einsum, 1x1 convolutions, decomposed LayerNorms).
- `layout`: where the elements of a reshaped, transposed, split or sliced tensor come from.
- `rowform`: a tensor whose rows are ``s_m (sum_i F_i[m] A_i + T_m) + b``, as linear layers, LayerNorm, Concat and
  additions of constants make them. `tables`: constant rows on a grid, T, as one small table per axis.
- `sites`: products with an operand that is a layout of such rows; the cost of re-association, and the decision.
- `softmax`: properties of scores before a softmax, and of probabilities after it.
- `rewrite`: the new nodes of a site.
- `parts`: concatenated rows of several inputs, taken apart so that each input is folded separately.
- `products`: consecutive linear layers, and the projection after a read.
- `slicing`: regions that treat an axis row by row, and copies of them for some rows.
- `latents`: the cut into encoder and decoders.
- `plan`: the pieces that keep the activations within a budget.
- `dynamic`: dynamic dimensions, each folded with a prime number in its place.

`engine.fold` applies all folds; `nodes` reads and makes nodes. If nothing pays, the graph stays as it is.
"""
