# SPDX-License-Identifier: Apache-2.0
"""The network that tests of TensorRT's API build and run, and what an inspector says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from perceiver_export.runtimes.manifest import TensorSpec
from tests.runtimes.fake_tensorrt import API, Fake, FakeModule, layer, tensor

RTX = "1.7.1.116"
VERSIONS = tuple(version for version in API if version != RTX)
X, Y = TensorSpec("x", "float32", (2, 3)), TensorSpec("y", "float32", (2, 3))
RANGED = {"batch": (1, 4)}


def network(half: str) -> Callable[[FakeModule], list[Fake]]:
    """A normalization, an int8 product, a product of activations of type ``half``, one that overflows, an index that is
    computed beside it, and a product of constants, which no engine has a kernel for.
    """

    def layers(module: FakeModule) -> list[Fake]:
        types = (half, "int8", half, "int8", half, half, "float32", half, half, half, "int32")
        x, q, d, w, wd, y, z, c, sums, product, row = (
            tensor(module, name, dtype)
            for name, dtype in zip(
                ["x", "q", "d", "w", "e", "y", "z", "c", "sums", "product", "row"], types, strict=True
            )
        )
        return [
            layer(module, "NORMALIZATION", "norm", [x], x),
            layer(module, "QUANTIZE", "x/Quantize", [x], q),
            layer(module, "DEQUANTIZE", "x/Dequantize", [q], d),
            layer(module, "CONSTANT", "w", [], w),
            layer(module, "DEQUANTIZE", "w/Dequantize", [w], wd),
            layer(module, "MATRIX_MULTIPLY", "linear/MatMul_1", [d, wd], y),
            layer(module, "MATRIX_MULTIPLY", "attention/MatMul_1", [y, x], y),
            layer(module, "SOFTMAX", "attention/Softmax_1", [y], y),
            layer(module, "MATRIX_MULTIPLY", "attention/MatMul_2:fp32", [z, z], z),
            layer(module, "CAST", "row/Cast:fp32", [z], row),
            layer(module, "CONSTANT", "c", [], c),
            layer(module, "CONCATENATION", "c/Concat", [c, c], sums),
            layer(module, "MATRIX_MULTIPLY", "constants/MatMul", [sums, c], product),
        ]

    return layers


def inspector(linear: str = "Int8", attention: str = "Half", last: str = "Float") -> str:
    """What TensorRT's inspector gives of that network."""
    found = {"linear/MatMul_1": linear, "attention/MatMul_1": attention, "attention/MatMul_2:fp32": last}
    layers = [
        {
            "Name": name,
            "LayerType": "gemm",
            "Inputs": [{"Name": "a", "Format/Datatype": f"Row major linear {dtype}"}],
            "Outputs": [],
            "Metadata": f"[ONNX Layer: {name}]",
        }
        for name, dtype in found.items()
    ]
    return json.dumps({"Layers": layers})


def made(version: str, report: str | None = None, **more: Any) -> FakeModule:
    return FakeModule(version, network("float16"), inspector() if report is None else report, **more)


def no_cuda(logger: Any) -> Any:
    """What TensorRT's `Builder` and `Runtime` do where CUDA does not start for them."""
    logger.log(1, "CUDA initialization failure with error: 35")
    raise TypeError("pybind11::init(): factory function returned nullptr")
