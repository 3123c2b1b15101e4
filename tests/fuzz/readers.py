# SPDX-License-Identifier: Apache-2.0
"""Feed damaged files to every reader of files, and see that each is read, or refused with one of our errors.

    python tests/fuzz/readers.py --minutes 30 --seed 1
    python tests/fuzz/readers.py --cases 20000 --only manifest,npz

Seeds are files that the product itself writes, or that its formats allow. A mutation changes JSON by its structure
(a value of another type, a key gone, a name that leaves the directory, deep nesting, absurd sizes), else bytes
(flipped, cut, repeated, swapped for extreme integers). A case fails where a reader raises anything but
`PerceiverExportError`, takes more than 10 seconds, more than 4 GiB, ends the process, or writes anything. Prints the
seed and the file of each failure, and its counts; exits with 1 where anything failed.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_SECONDS, _BYTES = 10, 4 << 30
_PER_CHILD = 500  # cases that one forked process runs
_NAMES = ("../x", "x/../../y", "/etc/passwd", "a\0b", "\x1b[31m", "x" * 5000, "", "é\ud800", "${x}", "<script>")
_NUMBERS = (0, -1, 1, 2**31, -(2**31), 2**63, 2**64, 1e308, -0.0, 1 << 20, 10**12)
_VALUES: tuple[Any, ...] = (*_NAMES, *_NUMBERS, None, True, [], {}, [[]], {"a": 1}, "NaN")

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """A reader: the name of the file that it reads, whole files to begin with, whether they are JSON, and what whole
    files lie beside them.
    """

    file: str
    seeds: tuple[bytes, ...]
    read: Read
    is_json: bool = False
    beside: Mapping[str, bytes] = field(default_factory=dict)


def targets(points: Path | None = None) -> dict[str, Target]:
    """Every reader of files that come from somewhere else; ``points`` is `small_models.points` as a bundle."""
    return {
        **_bundle_targets(points),
        **_media_targets(),
        **_checkpoint_targets(),
        **_config_targets(),
        **_text_targets(),
        **_data_targets(),
    }


def _bundle_targets(points: Path | None) -> dict[str, Target]:
    from perceiver_export.calibration.graphs import load_graph
    from perceiver_export.calibration.quantization.record import Calibration
    from perceiver_export.exporter.onnx_files import OnnxFile
    from perceiver_export.runtimes import load_onnx
    from perceiver_export.runtimes.bundle import read_manifest
    from perceiver_export.runtimes.certificates import _Record
    from perceiver_export.runtimes.engines.cache import read_record
    from perceiver_export.runtimes.external_data import external_files
    from perceiver_export.runtimes.figures import measurements, relative_times
    from perceiver_export.runtimes.files import read_json
    from perceiver_export.runtimes.npz import Npz, read_npz
    from perceiver_export.runtimes.tasks import checked_task

    def manifest(path: Path) -> object:
        return checked_task(read_manifest(path.parent))

    def rows(path: Path) -> object:
        with Npz(path) as archive:
            return [index for index, _ in archive.rows()]

    made = _bundle(points)
    graph, weights = {}, {"model.weights": made["model.weights"]}
    readers = {"graph": load_graph, "graph-names": external_files, "graph-ort": load_onnx, "graph-export": OnnxFile}
    for name, read in readers.items():
        graph[name] = Target("model.onnx", (made["model.onnx"],), read, beside=weights)
    return {
        **graph,
        "manifest": Target("manifest.json", (made["manifest.json"], _old_manifest()), manifest, True),
        "report": Target(
            "report.json",
            (b'{"bench": {"a CPU": {"ort-cpu": {"p50": 1.0, "throughput": 9.0, "batch": 1}}}}',),
            lambda path: (relative_times(path.parent, "ort-cpu"), measurements(path.parent)),
            True,
        ),
        "engine": Target("engine.json", (made["engine.json"],), lambda path: read_record(path.parent), True),
        "calibration": Target(
            "calibration.json", (made["calibration.json"],), lambda p: read_json(p, Calibration), True
        ),
        "certificates": Target("calibration.json", (made["calibration.json"],), lambda p: read_json(p, _Record), True),
        "json": Target("x.json", (b'{"a": [{"b": "[[["}]}',), lambda p: read_json(p, dict[str, Any]), True),
        "npz": Target("x.npz", (_npz(np.savez), _npz(np.savez_compressed), made["golden.npz"]), read_npz),
        "npz-rows": Target("x.npz", (_npz(np.savez), _npz(np.savez_compressed)), rows),
    }


def _media_targets() -> dict[str, Target]:
    from perceiver_export.runtimes.tasks.image_files import read_image
    from perceiver_export.runtimes.tasks.images import load_npy
    from perceiver_export.runtimes.tasks.points import read_points
    from perceiver_export.runtimes.tasks.sound import take_sound

    array = _written(np.save, np.arange(6.0).reshape(2, 3))
    ply = b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    return {
        "picture": Target("x.png", tuple(_pictures()), read_image),
        "wav": Target("x.wav", (_wav(2, 1), _wav(1, 2), _wav(4, 1)), lambda path: take_sound(path, 8000, 100)),
        "npy": Target("x.npy", (array,), lambda path: load_npy(path).tobytes()),
        "ply": Target("x.ply", (ply + b"0 1 2\n3 4 5\n",), read_points),
        "xyz": Target("x.xyz", (b"0 1 2\n3 4 5\n",), read_points),
    }


def _checkpoint_targets() -> dict[str, Target]:
    import torch
    from safetensors.torch import save

    from perceiver_export.exporter.checkpoints.haiku_pickle import read_haiku
    from perceiver_export.exporter.checkpoints.weights import read_state_dict
    from tests.exporter import haiku_writer

    tensors = {"a.weight": torch.zeros(2, 3), "b": torch.ones(1)}
    pickled = _written(lambda file: torch.save({"state_dict": tensors}, file))
    params = haiku_writer.flat_mappings({"m/~/linear": {"w": np.zeros((2, 3), np.float32)}})
    return {
        "safetensors": Target("model.safetensors", (save(tensors),), lambda path: read_state_dict(path.parent)),
        "torch": Target("pytorch_model.bin", (pickled,), lambda path: read_state_dict(path.parent)),
        "haiku": Target("x.pickle", (haiku_writer.dumps(params), haiku_writer.dumps(params, 2)), read_haiku),
        "shards": Target(
            "model.safetensors.index.json",
            (b'{"metadata": {"total_size": 28}, "weight_map": {"a.weight": "a.safetensors", "b": "a.safetensors"}}',),
            lambda path: read_state_dict(path.parent),
            True,
            {"a.safetensors": save(tensors)},
        ),
    }


def _config_targets() -> dict[str, Target]:
    from perceiver_export.exporter.checkpoints.huggingface import architecture
    from perceiver_export.exporter.checkpoints.huggingface_config import TASKS, default_image_size, read_config
    from perceiver_export.exporter.checkpoints.preprocessor import image_preprocessing, read_preprocessor

    def config(path: Path) -> object:
        read = read_config(path.parent)
        return architecture(read, "huggingface", default_image_size(read, read_preprocessor(path.parent)))

    files = [ROOT / "examples" / name / "checkpoint" / "config.json" for name in ("fashion_mnist", "text_bytes")]
    own = [file.read_bytes() for file in files]
    more = {"train_size": [32, 48], "output_shape": [1, 2, 32, 32], "num_frames": 2, "id2label": {"0": "a", "1": "b"}}
    every = [json.dumps({**json.loads(own[1]), **more, "architectures": [name]}).encode() for name in TASKS]
    processor = (
        b'{"do_resize": true, "size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5], "resample": 3}'
    )
    return {
        "config": Target("config.json", (*own, *every), config, True),
        "processor": Target(
            "preprocessor_config.json",
            (processor,),
            lambda path: image_preprocessing(read_preprocessor(path.parent), 28, 28),
            True,
        ),
    }


def _text_targets() -> dict[str, Target]:
    from perceiver_export.exporter.checkpoints.tokenizer import find_tokenizer
    from perceiver_export.runtimes.tasks.tokenizers import FileTokenizer

    def read(path: Path) -> object:
        steps = find_tokenizer(path.parent, "fill-mask", 16, 99).steps
        if steps is None or steps.tokenizer is None:
            return None
        tokenizer = FileTokenizer(path.parent / "tokenizer.json", steps, steps.tokenizer)
        return tokenizer.text(tokenizer.encode("Hello, b\u00e4r 5")), tokenizer.symbol(3)

    files = tuple(_tokenizers())
    config = b'{"tokenizer_class": "XFast", "mask_token": {"content": "[MASK]"}, "model_max_length": 9}'
    return {
        "tokenizer": Target("tokenizer.json", files, read, True, {"tokenizer_config.json": config}),
        "tokenizer-config": Target("tokenizer_config.json", (config,), read, True, {"tokenizer.json": files[0]}),
    }


def _data_targets() -> dict[str, Target]:
    from perceiver_export.calibration.data.samples import Samples
    from perceiver_export.runtimes.manifest import decode_manifest

    def of(task: str, preprocessing: dict[str, Any], *inputs: dict[str, Any]) -> Read:
        manifest = decode_manifest(_manifest(task, preprocessing, *inputs))
        return lambda path: list(Samples(path, manifest, judged=True).stream)

    resize = {"type": "resize", "height": 8, "width": 8, "resample": "bilinear"}
    image = {"type": "image", "height": 8, "width": 8, "steps": [resize]}
    images = of("image-classification", image, {"name": "image", "dtype": "float32", "shape": [1, 3, 8, 8]})
    text = {"type": "text", "length": 16, "special_tokens": True}
    tokens = {"name": "tokens", "dtype": "int32", "shape": [1, 16]}
    texts = of("text-classification", text, tokens, {**tokens, "name": "tokens_mask"})
    rows = b'{"text": "a b", "label": "a"}\n{"text": "c", "label": 1}\n'
    table = b"file,label\na.png,a\na.png,1\n"
    archive = _written(np.savez, image=np.zeros((4, 8, 8, 3), np.uint8), label=np.array([0, 1, 1, 0]))
    return {
        "jsonl": Target("x.jsonl", (rows.split(b"\n")[0], rows.split(b"\n")[1]), texts, True),
        "jsonl-lines": Target("x.jsonl", (rows,), texts),
        "csv": Target("labels.csv", (table,), lambda p: images(p.parent), beside={"a.png": next(_pictures())}),
        "data-npz": Target("x.npz", (archive,), images),
    }


def mutations(target: Target, generator: random.Random) -> Iterator[bytes]:
    """Damaged files, one after another, for ever."""
    while True:
        content = generator.choice(target.seeds)
        if target.is_json and generator.random() < 0.8:
            yield _damaged_json(content, generator)
        else:
            yield _damaged_bytes(content, generator)


def _damaged_json(content: bytes, generator: random.Random) -> bytes:
    document = json.loads(content)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        places = list(_places(document))
        if not places:
            break
        holder, key = generator.choice(places)
        change = generator.randrange(6)
        if change == 0 and isinstance(holder, dict):
            holder[generator.choice(_NAMES)] = holder.pop(key)
        elif change == 1:
            del holder[key]
        elif change == 2:
            holder[key] = [holder[key]] * generator.choice((0, 2, 100))
        elif change == 3:
            holder[key] = "DEEP"
            return json.dumps(document).encode("utf-8", "surrogatepass").replace(b'"DEEP"', _nested(generator))
        else:
            holder[key] = copy.deepcopy(generator.choice(_VALUES))
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _nested(generator: random.Random) -> bytes:
    """Lists in lists, some deeper than any reader's stack."""
    depth = generator.choice((50, 99, 101, 5000, 100_000))
    return b"[" * depth + b"]" * depth


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _damaged_bytes(content: bytes, generator: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        place, change = generator.randrange(len(data) + 1), generator.randrange(6)
        if change == 0:
            data[place : place + 1] = bytes([generator.randrange(256)])
        elif change == 1:
            del data[place:]
        elif change == 2:
            data[place:place] = data[: generator.randrange(64)] * generator.choice((1, 50))
        elif change == 3:
            data[place : place + 4] = generator.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80")
            )
        elif change == 4:
            data[place : place + 8] = generator.choice((2**63, 2**32, 1)).to_bytes(8, "little")
        else:
            del data[place : place + generator.randrange(1, 16)]
    return bytes(data)


def run_cases(name: str, target: Target, seed: int, count: int, directory: Path) -> int:
    """Run cases in this process until one fails, and give how many passed."""
    from perceiver_export.runtimes.errors import PerceiverExportError

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {_SECONDS} s")

    logging.disable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, late)
    path = directory / target.file
    there = {target.file, *target.beside}
    for beside, whole in target.beside.items():
        (directory / beside).write_bytes(whole)
    for number, content in zip(range(count), mutations(target, random.Random(f"{name} {seed}")), strict=False):
        path.write_bytes(content)
        signal.alarm(_SECONDS)
        try:
            target.read(path)
        except PerceiverExportError:
            pass
        except BaseException as error:
            print(f"{name}, seed {seed}, case {number}: {type(error).__name__}: {error}", flush=True)
            print("".join(traceback.format_tb(error.__traceback__)[-3:]), flush=True)
            return number
        finally:
            signal.alarm(0)
        if set(os.listdir(directory)) != there:
            print(f"{name}, seed {seed}, case {number}: left {os.listdir(directory)}", flush=True)
            return number
    return count


def run_apart(name: str, target: Target, seed: int, count: int) -> tuple[int, bool]:
    """`run_cases` in a forked process with little memory: how many cases passed, and whether all did."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + _BYTES, size + _BYTES))
            os.write(write, str(run_cases(name, target, seed, count, Path(place))).encode())
            os._exit(0)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as answer:
            passed = answer.read()
        if status:
            kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}"
            kept.write_bytes((Path(place) / target.file).read_bytes())
            print(
                f"{name}, seed {seed}: the process ended with {os.waitstatus_to_exitcode(status)}: {kept}", flush=True
            )
        return int(passed or 0), int(passed or -1) == count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10**12, help="of all readers together")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of readers, separated by commas")
    options = parser.parse_args()
    found = {name: one for name, one in targets().items() if name in (options.only or name).split(",")}
    counts, failures = Counter[str](), Counter[str]()
    end, seed = time.monotonic() + 60 * options.minutes, options.seed
    share = min(_PER_CHILD, max(1, options.cases // len(found)))
    while counts.total() < options.cases and time.monotonic() < end:
        for name, target in found.items():
            passed, whole = run_apart(name, target, seed, share)
            counts[name] += passed
            failures[name] += not whole
        seed += 1
    for name, count in counts.items():
        print(f"{count:9,} {name}" + (f", {failures[name]} FAILED" if failures[name] else ""))
    print(f"{counts.total():,} cases, {failures.total()} failures, seeds {options.seed} to {seed - 1}")
    sys.exit(1 if failures.total() else 0)


def _bundle(plain: Path | None) -> dict[str, bytes]:
    """Files of a small bundle, quantized and built."""
    from perceiver_export.calibration import QuantizeOptions, quantize
    from perceiver_export.exporter import export
    from perceiver_export.runtimes import build
    from tests.cli.small_models import points

    with tempfile.TemporaryDirectory() as place:
        plain = plain or export(points(), Path(place) / "b").path
        quantized = quantize(plain, "random", Path(place) / "q", QuantizeOptions(samples=2))
        engine = build(quantized, "ort-cpu")[0].directory
        names = ("manifest.json", "calibration.json", "golden.npz", "model.onnx", "model.weights")
        files = {name: (Path(place) / "q" / name).read_bytes() for name in names}
        return {**files, "engine.json": (engine / "engine.json").read_bytes()}


def _old_manifest() -> bytes:
    return _manifest("arrays", None, {"name": "tokens", "dtype": "int32", "shape": [1, 4]})


def _manifest(task: str, preprocessing: dict[str, Any] | None, *inputs: dict[str, Any]) -> bytes:
    """A manifest, of schema version 1 where it prepares nothing."""
    part = {"file": "m.onnx", "inputs": inputs, "outputs": [{"name": "y", "dtype": "float32", "shape": [1, 2]}]}
    fields: dict[str, Any] = {
        "schema_version": 2 if preprocessing else 1,
        "name": "m",
        "task": task,
        "parity": "own",
        "source": "",
        "precision": "fp32",
        "architecture": {"inputs": {"tokens": {"vocabulary_size": 9}}},
        "parts": {"model": part},
        "labels": ["a", "b"] if preprocessing else [],
        "preprocessing": preprocessing,
        "verification": [],
        "tools": {},
        "files": {"m.onnx": {"sha256": "", "size": 1}},
    }
    return json.dumps(fields).encode()


def _written(save: Callable[..., object], *arguments: Any, **arrays: Any) -> bytes:
    """What ``save(file, …)`` writes."""
    buffer = io.BytesIO()
    save(buffer, *arguments, **arrays)
    return buffer.getvalue()


def _npz(save: Callable[..., object]) -> bytes:
    arrays = {"image": np.zeros((4, 2, 3), np.uint8), "labels": np.arange(4), "f": np.zeros((4, 2), order="F")}
    return _written(save, **arrays)


def _tokenizers() -> Iterator[bytes]:
    """tokenizer.json of each kind of model, with what may stand around it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = {"[UNK]": 0, "[MASK]": 1, "hello": 2, "b": 3, "##är": 4, "5": 5}
    for model in (
        models.WordLevel(words, unk_token="[UNK]"),
        models.WordPiece(words, unk_token="[UNK]"),
        models.BPE(vocab=words, merges=[], unk_token="[UNK]", byte_fallback=True),
        models.Unigram([(word, -1.0) for word in words], unk_id=0),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("l", "l")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.post_processor = processors.TemplateProcessing("[MASK] $A", special_tokens=[("[MASK]", 1)])
        tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=8)
        yield tokenizer.to_str().encode()


def _wav(width: int, channels: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, 8000, 0, "NONE", ""))
        file.writeframes(bytes(range(200)) * width * channels)
    return buffer.getvalue()


def _pictures() -> Iterator[bytes]:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8))
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        yield _written(image.save, kind)
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


if __name__ == "__main__":
    main()
