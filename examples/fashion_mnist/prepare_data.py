# SPDX-License-Identifier: Apache-2.0
"""Write the demo's data from Debian's `dataset-fashion-mnist`: test set, held-out training images, a few PNGs.

    python examples/fashion_mnist/prepare_data.py

The files hold the dataset's own pixels. Archives have no timestamps, so the same data gives the same bytes.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from train import HELD_OUT, LABELS, read_split

HERE = Path(__file__).parent


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Like numpy's `savez_compressed`, but with the strongest compression and without a date."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED, 9
            )


def main() -> None:
    """Write test.npz, held_out.npz and images/."""
    images, labels = read_split("t10k")
    write_npz(HERE / "test.npz", image=images, labels=labels)
    train_images, train_labels = read_split("train")
    write_npz(HERE / "held_out.npz", image=train_images[HELD_OUT], labels=train_labels[HELD_OUT])
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    rows = ["file,label"]
    for index, label in enumerate(LABELS):
        name = f"{label.lower().replace('/', '-').replace(' ', '-')}.png"
        Image.fromarray(images[int(np.argmax(labels == index))]).save(folder / name, optimize=True)
        rows.append(f"{name},{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
