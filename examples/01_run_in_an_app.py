# SPDX-License-Identifier: Apache-2.0
"""Run a bundle from an app: images in, labels out, no torch in the process.

perceiver-export export examples/fashion_mnist/checkpoint -o fashion
python examples/01_run_in_an_app.py fashion examples/fashion_mnist/images/bag.png
"""

import sys

from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.tasks import ImageClassification

if len(sys.argv) < 3:
    sys.exit("usage: 01_run_in_an_app.py BUNDLE PICTURE…")
bundle, *images = sys.argv[1:]
with open_task(bundle, ImageClassification, device="auto") as classify:
    print(classify.runtime.describe())
    for image in images:
        best = classify(image)[0]
        print(f"{image}: {best.label} ({best.probability:.1%})")
