# SPDX-License-Identifier: Apache-2.0
"""Which linears really run in integer kernels, as the engine itself says.

ONNX Runtime writes the graph that it made of ours, and a profile of the kernels that it ran; OpenVINO hands out the
model that it runs. Linears are found in them by the tensors that they give, which no optimizer renames.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from perceiver_export.calibration.linears import Linear
from perceiver_export.calibration.record import Coverage, Layer
from perceiver_export.calibration.sessions import open_session
from perceiver_export.runtimes.errors import MissingDependencyError, UsageError
from perceiver_export.runtimes.runtime import Feeds

_ORT_INTEGER = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul"})
_DEQUANTIZATION = "/DequantizationMultiply"  # what OpenVINO calls a product whose scales it has moved behind it
_OPENVINO_INTEGER = frozenset({"i8", "u8", "int8_t", "uint8_t"})


def measure_coverage(target: str, path: Path, linears: Sequence[Linear], feeds: Feeds) -> Coverage:
    """Compile the graph at ``path`` as the target does, run it once on ``feeds``, and ask the engine what it ran.

    Raises UsageError: a target of which this cannot be asked; MissingDependencyError, BundleError.
    """
    if target not in ENGINES:
        raise UsageError(f"coverage on {target} cannot be measured here", f"targets: {', '.join(ENGINES)}")
    engine, kernels = ENGINES[target](path, feeds)
    layers = []
    for linear in linears:
        # Either may be the name under which an engine keeps the product: its tensor, its bias's tensor, its node.
        names = (linear.node.outputs[0].name, linear.output.name, linear.node.name)
        kernel = next((kernels[str(name)] for name in names if name in kernels), None)
        found, integer = kernel or ("not found in what the engine runs", False)
        layers.append(Layer(linear.name, linear.group, linear.macs, found, integer))
    return Coverage(target, engine, tuple(layers))


Kernels = dict[str, tuple[str, bool]]  # by the tensor that a kernel gives: its name, and whether it multiplies integers


def _ort(path: Path, feeds: Feeds) -> tuple[str, Kernels]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        optimized = Path(directory) / "optimized.onnx"
        config = {
            "optimized_model_filepath": str(optimized),
            "session.optimized_model_external_initializers_file_name": "optimized.weights",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "enable_profiling": "yes",
            "profile_file_prefix": str(Path(directory) / "profile"),
        }
        session = open_session(ir.load(path), path.parent, config=config, in_order=True)
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_bytes())
        del session  # of what follows only the file that it wrote is read
        ran = {
            event["name"].removesuffix("_kernel_time"): event["args"]["op_name"]
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        }
        graph = ir.load(optimized).graph
        kernels: Kernels = {}
        for node in graph:
            op = ran.get(node.name or "", node.op_type)
            kernels |= {str(value.name): (op, op in _ORT_INTEGER) for value in node.outputs}
    return f"onnxruntime {onnxruntime.__version__}", kernels


def _openvino(path: Path, feeds: Feeds) -> tuple[str, Kernels]:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            "coverage on OpenVINO needs openvino", "pip install 'perceiver-export[openvino]'"
        ) from error
    core = openvino.Core()
    model = core.read_model(str(path))
    producers = {op.friendly_name: _tensor_names(op) for op in model.get_ops()}
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kernels: Kernels = {}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        layer, precision = _text(info, "layerType"), _text(info, "runtimePrecision")
        is_product = layer in ("FullyConnected", "MatMul")
        primitive = _text(info, "primitiveType")
        kernel = (f"{layer} {precision} {primitive}", is_product and precision in _OPENVINO_INTEGER)
        for name in _text(info, "originalLayersNames").split(","):
            original = name.removesuffix(_DEQUANTIZATION)
            for known in (original, *producers.get(original, ())):
                if is_product or known not in kernels:  # what is fused into something else is named after that
                    kernels[known] = kernel
    return f"openvino {openvino.__version__.split('-')[0]}", kernels


def _tensor_names(op: Any) -> list[str]:
    return [name for output in op.outputs() for name in output.get_names()]


def _text(info: Any, name: str) -> str:
    value = info[name] if name in info else ""  # noqa: SIM401  it has no `get`
    return str(getattr(value, "value", value))


ENGINES: dict[str, Callable[[Path, Feeds], tuple[str, Kernels]]] = {"ort-cpu": _ort, "openvino-cpu": _openvino}
