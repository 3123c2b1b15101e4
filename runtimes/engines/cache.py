# SPDX-License-Identifier: Apache-2.0
"""Compiled engines on disk. engine.json identifies each one; a single rename or exchange publishes it.

Engines are stored in the bundle, `engines/TARGET/KEY/`. If the bundle is read-only, they go to the user's cache
directory, under the hash of the bundle's manifest. A lock keeps two builders of one target apart. engine.json records
the model, the options and the platform of the build, and is read before any other file of the engine.

The libraries do not check the engines that they load: one changed byte can crash the process, or worse. A hash stored
beside an engine proves only that the copy is complete, because anyone who changes the engine can change the hash too.
So `build` signs engine.json (HMAC-SHA256) with a key of 32 random bytes in the user's configuration directory, and an
engine without that signature is never loaded. PERCEIVER_EXPORT_ENGINE_KEY names another key file: a fleet of devices
can then load engines that one machine built.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from perceiver_export.runtimes import files
from perceiver_export.runtimes.bundle import Bundle, Verify, check_files, sha256
from perceiver_export.runtimes.engines.backend import Backend, EngineOptions, Platform, Source, find_target
from perceiver_export.runtimes.engines.flags import flag_problem
from perceiver_export.runtimes.errors import BuildError, BundleError
from perceiver_export.runtimes.manifest import FileEntry, Manifest, Part

SCHEMA_VERSION = 1
RECORD = "engine.json"
ENVIRONMENT = "PERCEIVER_EXPORT_ENGINE_KEY"
_KEY_BYTES = 32


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that an engine depends on. Its hash is the engine's key."""

    target: str
    part: str
    model: str  # hash over the graph's and the weights' hashes
    precision: str  # of the bundle
    options: EngineOptions
    platform: Platform

    @property
    def key(self) -> str:
        """Name of the engine's directory: 16 hexadecimal digits."""
        return _hash(self)[:16]


class Record(msgspec.Struct, frozen=True):
    """The contents of engine.json. Unknown fields are allowed, because a newer version may add some.

    ``mac`` signs all other fields, including the hashes of the engine's files.
    """

    schema_version: int
    identity: Identity
    files: dict[str, FileEntry]
    seconds: float  # compile time
    mac: str = ""

    def signed(self, key: bytes) -> Record:
        """The same record, signed with ``key``."""
        return msgspec.structs.replace(self, mac=self._signature(key))

    def distrust(self) -> tuple[str, ...]:
        """Why the engine must not be loaded; empty if this user built it."""
        import hmac

        try:
            if hmac.compare_digest(self.mac.encode(), self._signature(read_key()).encode()):
                return ()
            why = "engine.json has no valid signature"
        except FileNotFoundError:
            why = "the key does not exist yet"
        except (OSError, ValueError) as error:
            why = str(error)
        return (f"it is not signed with this user's key, {key_file()}: {why}",)

    def _signature(self, key: bytes) -> str:
        import hmac  # loads OpenSSL, a tenth of this package's import time

        content = msgspec.json.encode(msgspec.structs.replace(self, mac=""), order="sorted")
        return hmac.new(key, b"perceiver-export engine\0" + content, "sha256").hexdigest()


class Candidate(msgspec.Struct, frozen=True):
    """An engine in the bundle or in the cache. ``problems`` says why it cannot be used here; empty if it can.

    ``trusted``: this user built it. engine.json of an untrusted engine is only displayed.
    """

    directory: Path
    record: Record
    problems: tuple[str, ...]
    trusted: bool


def _hash(document: object) -> str:
    import hashlib

    return hashlib.sha256(msgspec.json.encode(document, order="sorted")).hexdigest()


def key_file() -> Path:
    """The path of the key, which need not exist."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "perceiver-export" / "engine.key"


def read_key() -> bytes:
    """The key. Raises FileNotFoundError: no key yet; ValueError: the file cannot be trusted; OSError."""
    path, named = key_file(), bool(os.environ.get(ENVIRONMENT))
    key = files.read_bytes(path.resolve() if named else path, 1 << 10)
    status = path.stat()
    # A key named by the variable may belong to root and be readable by a group: 0640.
    if status.st_uid not in ({os.geteuid(), 0} if named else {os.geteuid()}):
        raise ValueError(f"{path} belongs to another user")
    if status.st_mode & (0o027 if named else 0o077):
        raise ValueError(f"{path} can be read or written by others: chmod {'0640' if named else '0600'} {path}")
    if len(key) != _KEY_BYTES:
        raise ValueError(f"{path} has {len(key)} bytes instead of {_KEY_BYTES}")
    return key


def ensure_key() -> bytes:
    """The key, created if missing. Raises BuildError: it cannot be created, read or trusted."""
    path = key_file()
    try:
        if not os.path.lexists(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with files.locked(path.parent.resolve()):  # two builds may create it at the same time
                if not path.exists():
                    with files.replacing(path) as temporary:
                        temporary.chmod(0o600)
                        temporary.write_bytes(os.urandom(_KEY_BYTES))
        return read_key()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise BuildError(
            f"the key that signs engines, {path}, cannot be used: {said or error}",
            f"correct its permissions, or name another file in {ENVIRONMENT}: 32 random bytes, mode 0600",
        ) from error


def files_of(manifest: Manifest, graph: str) -> dict[str, str]:
    """SHA-256, by file name, of a graph and its weights: the bundle's shared file, or that of the graph's lowering."""
    return {
        name: entry.sha256
        for name, entry in manifest.files.items()
        if name in (graph, "model.weights")
        or (graph.endswith(f".{name.removesuffix('.weights')}.onnx") and not name.endswith((".onnx", ".npz", ".json")))
    }


def graphs_of(manifest: Manifest, target: str, precision: str) -> dict[str, str]:
    """SHA-256, by file name, of all graphs and weights that a target runs in that precision. Raises DeviceError."""
    found: dict[str, str] = {}
    for part in manifest.parts.values():
        found |= files_of(manifest, graph_for(part, target, precision))
    return dict(sorted(found.items()))


def graph_for(part: Part, target: str, precision: str) -> str:
    """The graph file of a part from which an engine of this target and precision is built."""
    lowering = find_target(target).lowering(precision)
    on_arm = f"{lowering}-arm64"  # ONNX Runtime's integer kernels on ARM need another form of the graph
    if on_arm in part.lowered and platform.machine().lower() in ("aarch64", "arm64"):
        lowering = on_arm
    return part.graph_for(lowering)


def model_hash(bundle: Bundle, graph: str) -> str:
    """One hash for a graph and its weights, from those in the manifest."""
    return _hash(files_of(bundle.manifest, graph))


def make_source(bundle: Bundle, part: Part, target: str, options: EngineOptions) -> Source:
    """The graph of a part that this target runs, with the ranges of its dynamic dimensions added to the options.

    Raises BundleError: the bundle is quantized and has no graph for this target.
    """
    precision, quantized = bundle.manifest.precision, bundle.manifest.quantization
    graph = graph_for(part, target, options.precision)
    floats = precision == "fp32" or (quantized is not None and not quantized.int8_activations)
    if target.startswith("ort-") and not floats and graph == part.file:
        said = f"{bundle.path} is {precision} but has no graph rewritten for {target}"
        raise BundleError(said, "quantize the fp32 bundle again to write that graph")
    ranges = {name: sizes for spec in part.inputs for name, sizes in spec.ranges.items()}
    shapes = {name: options.shapes.get(name, (least, least, most)) for name, (least, most) in ranges.items()}
    options = msgspec.structs.replace(options, shapes=shapes)
    return Source(target, bundle.file(graph), options, precision, part.inputs, part.outputs, part.plan)


def identify(bundle: Bundle, part: str, source: Source, here: Platform) -> Identity:
    """The identity that an engine of this part would have if it were compiled here now."""
    model = model_hash(bundle, source.graph.relative_to(bundle.path).as_posix())
    return Identity(source.target, part, model, source.precision, source.options, here)


def mismatches(bundle: Bundle, built: Identity, here: Identity, backend: Backend) -> tuple[str, ...]:
    """The differences between an engine and the one that would be built here, one phrase each.

    A precision may have a graph of its own, so the models are compared in the engine's precision. The caller compares
    the other options.
    """
    allowed = backend.flags(here.target)
    found = [problem for flag in built.options.flags.items() if (problem := flag_problem(*flag, allowed))]
    part = bundle.manifest.parts.get(built.part)
    graph = "" if part is None else graph_for(part, here.target, built.options.precision)
    if built.part != here.part or built.model != model_hash(bundle, graph):
        found.append("it was built from another model")
    if built.options.shapes != here.options.shapes:
        found.append(f"it was built for the shapes {built.options.shapes}, but the bundle has {here.options.shapes}")
    return (*found, *backend.differences(built.platform, here.platform))


def read_record(directory: Path) -> Record | None:
    """The directory's engine.json; None if it is missing, damaged, a link or of a newer schema."""
    try:
        record = files.decode_json(files.read_bytes(directory / RECORD), Record)
    except (OSError, ValueError):
        return None
    return record if record.schema_version <= SCHEMA_VERSION else None


def candidates(bundle: Bundle, here: Identity, backend: Backend) -> tuple[Candidate, ...]:
    """Engines of that target and part, newest first. Only engine.json is read."""
    found = []
    for directory in _places(bundle, here.target):
        record = None if directory.is_symlink() else read_record(directory)
        if record is not None and record.identity.target == here.target and record.identity.part == here.part:
            distrust = record.distrust()
            problems = (*distrust, *mismatches(bundle, record.identity, here, backend))
            with contextlib.suppress(OSError):  # another process removed it
                written = (directory / RECORD).stat().st_mtime_ns
                found.append((written, Candidate(directory, record, problems, not distrust)))
    return tuple(one for _, one in sorted(found, key=lambda pair: pair[0], reverse=True))


def unreadable(bundle: Bundle, target: str) -> str:
    """A message for the first link or damaged engine of that target; empty if there is none."""
    for place in _places(bundle, target):
        if place.is_symlink():
            return _is_link(place)
        if read_record(place) is None:
            return f"the engine in {place} cannot be read: its engine.json is missing, damaged or from a newer version"
    return ""


def check_engine(candidate: Candidate, verify: Verify) -> None:
    """Raise BundleError if a file of the engine has changed since the build; ``verify`` is as for a bundle's files."""
    check_files(candidate.directory, candidate.record.files, verify, RECORD)


@contextlib.contextmanager
def builders_lock(root: Path, target: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of one target's engines. If another process holds it, ``waiting`` is called once.

    Raises BuildError: the directory cannot be written.
    """
    import shutil

    directory = root / target
    _check_no_links(root, directory)
    with files.writing(root, BuildError, "check its permissions"):
        directory.mkdir(parents=True, exist_ok=True)
        with files.locked(directory, waiting=waiting):
            for left in directory.glob(".*.partial"):  # left by killed builds
                shutil.rmtree(left, ignore_errors=True)
            yield


def publish(root: Path, identity: Identity, build: Callable[[Path], None]) -> tuple[Path, float]:
    """Let ``build`` fill a temporary directory, then rename it into place. Returns the place and the build's seconds.

    The caller holds the lock. Raises BuildError: the key cannot be used, or the directory is a link; OSError.
    """
    key, place = ensure_key(), root / identity.target / identity.key
    _check_no_links(place)
    if not place.is_dir():
        place.unlink(missing_ok=True)
    with files.replacing(place, directory=True) as temporary:
        start = time.perf_counter()
        build(temporary)
        seconds = time.perf_counter() - start
        entries = {file.name: FileEntry(sha256(file), file.stat().st_size) for file in sorted(temporary.iterdir())}
        record = Record(SCHEMA_VERSION, identity, entries, seconds)
        (temporary / RECORD).write_bytes(files.encode_json(record.signed(key)))
    return place, seconds


def writable_root(bundle: Bundle) -> Path:
    """The bundle's directory for engines, or the user's cache if the bundle is read-only.

    Raises BuildError: the directory is a link.
    """
    own, cached = _roots(bundle)
    _check_no_links(own)
    with contextlib.suppress(OSError):
        own.mkdir(exist_ok=True)
        if os.access(own, os.W_OK | os.X_OK):
            return own
    return cached


def _roots(bundle: Bundle) -> tuple[Path, Path]:
    """The two directories for this bundle's engines: inside it, and in the user's cache."""
    manifest = bundle.path / "manifest.json"
    with files.reading(manifest, BundleError):
        digest = sha256(manifest)
    return bundle.path / "engines", files.cache_directory() / "engines" / digest[:32]


def _places(bundle: Bundle, target: str) -> Iterator[Path]:
    """Every entry in a target's directories of engines. A link on the path is yielded instead of being followed."""
    for root in _roots(bundle):
        links = [place for place in (root, root / target) if place.is_symlink()]
        if links:
            yield links[0]
            continue
        with contextlib.suppress(OSError):
            yield from (entry for entry in (root / target).iterdir() if not entry.name.startswith("."))


def _check_no_links(*places: Path) -> None:
    """Raise BuildError if a path is a link: the engine would be written wherever it points."""
    for place in places:
        if place.is_symlink():
            raise BuildError(_is_link(place), "remove the link, or build in a copy of the bundle")


def _is_link(place: Path) -> str:
    return f"{place} is a symbolic link; engines are not stored behind links"
