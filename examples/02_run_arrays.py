# SPDX-License-Identifier: Apache-2.0
"""Arrays in, arrays out: for an app with its own camera and its own preprocessing.

python examples/02_run_arrays.py fashion
"""

import sys

import numpy as np

from perceiver_export.runtimes import load

if len(sys.argv) != 2:
    sys.exit("usage: 02_run_arrays.py BUNDLE")
with load(sys.argv[1]) as runtime:
    for spec in (*runtime.inputs, *runtime.outputs):
        print(spec.name, spec.dtype, spec.shape, spec.meaning)
    frame = np.zeros((1, 3, 28, 28), np.float32)
    buffer = np.empty((1, 10), np.float32)

    print(runtime.run({"image": frame})["logits"])  # a new array, yours to keep
    runtime.run({"image": frame}, out={"logits": buffer})  # into your own array
    print(buffer)
    future = runtime.submit({"image": frame})  # in the background
    print(future.result()["logits"])
