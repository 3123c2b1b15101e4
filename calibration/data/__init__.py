# SPDX-License-Identifier: Apache-2.0
"""DATA: the samples for `quantize`, which uses a bundle's inputs, and for `validate`, which also uses targets.

| DATA | for | contents |
|---|---|---|
| directory of class folders | images | each folder is named after a label: its name or its index |
| directory with labels.csv | images | columns ``file`` and ``label`` |
| directory of images | images | no labels |
| .npz, or a directory of them | all | arrays by input name, samples on the first axis |
| .jsonl | text | one object per line: ``{"text": "…"[, "label": …]}`` |
| module:function, or an iterable | all | one dict per sample: arrays by input name, ``image``, ``text``, ``label`` |
| ``random`` | `quantize` | random numbers, to choose a device by speed and memory; the bundle records this |

Arrays have the shapes of the model's inputs, with or without a leading axis of size 1. Images may also be uint8 (H, W)
or (H, W, 3), frames of optical flow uint8 (2, H, W, 3). Without a mask, ``NAME_mask``, nothing is masked.

``label`` and ``labels`` mean the same. The form of a label depends on the kind of output that is compared with it:

| output | label | target ``label`` |
|---|---|---|
| single-label | an index, or a name | int64 () |
| multi-label | a list of them ("a;b" in text), or zeros and ones (labels,) | float32 (labels,) |
| regression | a number, or one per value | float32 (values,) |
| none | any array | that array |

Other targets: ``flow`` (H, W, 2) for optical flow, NaN where it is unknown; the inputs of a video autoencoder; the
tokens of a masked language model, of which `validate` masks 15 %; any array for your own metric.
"""
