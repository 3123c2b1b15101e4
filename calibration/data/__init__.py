# SPDX-License-Identifier: Apache-2.0
"""DATA: the samples for `quantize`, which uses a bundle's inputs, and `validate`, which uses targets as well.

| DATA | for | what it holds |
|---|---|---|
| directory of class folders | images | folders are named by a label: its name or its index |
| directory with labels.csv | images | columns ``file`` and ``label`` |
| directory of images | images | no labels |
| .npz, or a directory of them | all | arrays by input name, samples on the first axis |
| .jsonl | text | one object per line: ``{"text": "…"[, "label": …]}`` |
| module:function, or an iterable | all | one dict per sample: arrays by input name, ``image``, ``text``, ``label`` |
| ``random`` | `quantize` | random numbers, to size a device; the bundle always says so |

Arrays come as the model takes them, with or without an axis of 1 in front. Images may also be uint8 (H, W) or
(H, W, 3), frames of optical flow uint8 (2, H, W, 3). A mask, ``NAME_mask``, may be left out: then nothing is masked.

``label`` and ``labels`` mean the same. What a label is depends on the output that it judges:

| output | label | target ``label`` |
|---|---|---|
| single-label | an index, or a name | int64 () |
| multi-label | a list of them ("a;b" in text), or zeros and ones (labels,) | float32 (labels,) |
| regression | a number, or one for each value | float32 (values,) |
| none | any array | that array |

Other targets: ``flow`` (H, W, 2) of optical flow, NaN where it is unknown; the inputs of a video autoencoder; the
tokens of a masked language model, of which `validate` masks 15 %; any array for a metric of your own.
"""
