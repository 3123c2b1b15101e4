# SPDX-License-Identifier: Apache-2.0
"""Exact folds of any ONNX graph: the same function with less work.

No pattern of a model, and none of attention, is looked for. Each fold re-associates one matrix product:

- `normalize`: one spelling for what can be said in many (Gemm, Einsum, 1x1 convolutions, decomposed LayerNorms).
- `layout`: where the elements of a reshaped, transposed, split or sliced tensor come from.
- `rowform`: a tensor whose rows are ``s_m (sum_i F_i[m] A_i + T_m) + b``: what linear layers, LayerNorm, Concat and
  additions of constants make. `tables`: constant rows on a grid, T, as one small table an axis.
- `sites`: products one of whose operands is a layout of such rows; what re-association costs, and what was decided.
- `softmax`: what is known of scores on their way to a softmax, and of probabilities behind it.
- `rewrite`: the new nodes of a site.
- `parts`: rows of several inputs side by side, taken apart so that each input is folded by itself.
- `products`: linear layers in a row, and the projection behind a read.
- `slicing`: regions that treat an axis row by row, and copies of them for some rows.
- `plan`: which pieces keep the activations within a budget.
- `dynamic`: a range of samples, folded with a prime number in its place.

`engine.fold` is the whole of it; `nodes` reads and makes nodes. A graph in which nothing pays stays as it is.
"""
