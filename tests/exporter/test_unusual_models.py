# SPDX-License-Identifier: Apache-2.0
"""Modules and ONNX files that do what few do: change their inputs, return infinities, fail on some inputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional

from perceiver_export.exporter import ExportOptions, OwnModel, export
from perceiver_export.exporter.verification import TOLERANCE
from perceiver_export.runtimes import Bundle, decode, load
from perceiver_export.runtimes.errors import ExportError, PerceiverExportError, UnsupportedModelError, VerificationError
from perceiver_export.runtimes.runtime import Array, Runtime
from tests.calibration.onnx_text import write
from tests.exporter.any_modules import Computes

RANGE = ExportOptions(batch="1:2:4")


def assert_bundle_is(bundle: Bundle, module: nn.Module, *given: Tensor) -> None:
    expected = module(*(one.clone() for one in given)).detach().numpy()
    with load(bundle) as runtime:
        names = [spec.name for spec in runtime.inputs]
        (found,) = runtime.run({name: one.numpy() for name, one in zip(names, given, strict=True)}).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected[np.isfinite(expected)]).max())


def test_a_forward_that_changes_its_input(tmp_path: Path) -> None:
    module, image = Computes(lambda x: x.div_(255).mean((2, 3))), 255 * torch.rand(2, 3, 8, 8)
    before = image.clone()
    bundle = export(OwnModel(module, (image,)), tmp_path / "b")

    assert torch.equal(image, before)
    assert_bundle_is(bundle, module, image)


@pytest.mark.parametrize("takes", [True, False])
def test_a_dtype_that_numpy_lacks_is_refused(takes: bool, tmp_path: Path) -> None:
    given = torch.rand(2, 4, dtype=torch.bfloat16 if takes else torch.float32)
    with pytest.raises(UnsupportedModelError, match="bfloat16") as raised:
        export(OwnModel(Computes(lambda x: x.to(torch.bfloat16)), (given,)), tmp_path / "b")
    assert "float32" in raised.value.hint


class Twice(nn.Module):
    """Has weights called ``norm`` and ``model.norm``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.model = nn.LayerNorm(4), nn.ModuleDict({"norm": nn.LayerNorm(4)})
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model["norm"](self.norm(x) ** 2)
        return y


def test_weights_of_one_name_in_a_module_called_model(tmp_path: Path) -> None:
    module, rows = Twice(), torch.randn(2, 4)
    assert_bundle_is(export(OwnModel(module, (rows,)), tmp_path / "b"), module, rows)


class InFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class OtherInFloat64(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.dtype == torch.float64 else 1)


@pytest.mark.parametrize("kind", [InFloat32, OtherInFloat64])
def test_a_wrong_graph_is_refused_whatever_the_module_does_in_float64(
    kind: type[nn.Linear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Runtime.run

    def run(self: Runtime, *arguments: Any) -> dict[str, Array]:
        return {name: 1.05 * array for name, array in original(self, *arguments).items()}

    monkeypatch.setattr(Runtime, "run", run)
    with pytest.raises(VerificationError, match="output"):
        export(OwnModel(kind(4, 3), (torch.rand(2, 4),)), tmp_path / "b")


def test_infinities_of_the_module_stay(tmp_path: Path) -> None:
    module = Computes(lambda x: x.masked_fill(torch.arange(4) > 2, -torch.inf))
    assert_bundle_is(export(OwnModel(module, (torch.rand(2, 4),)), tmp_path / "b"), module, torch.rand(2, 4))


class FewSamples(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] <= 2, "at most 2"
        return super().forward(x)


@pytest.mark.parametrize("batch", ["4", "1:2:4"])
def test_a_number_of_samples_that_forward_refuses(batch: str, tmp_path: Path) -> None:
    with pytest.raises((UnsupportedModelError, ExportError), match="at most 2") as raised:
        export(OwnModel(FewSamples(4, 3), (torch.rand(2, 4),)), tmp_path / "b", ExportOptions(batch=batch))
    assert raised.value.hint


class Pooled(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask.float()
        return (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


class FloatTokens(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.long())


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (Computes(lambda x: torch.log(x + 1e-6).mean((2, 3))), (torch.rand(2, 3, 8, 8),)),
        (Pooled(), (torch.rand(4, 2, 5), torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0]]))),
        (FloatTokens(10, 4), (torch.tensor([[1.0, 2.0, 9.0]]),)),
    ],
    ids=["logarithm", "mask", "tokens"],
)
def test_random_inputs_stay_where_the_module_is_defined(
    module: nn.Module, given: tuple[Tensor, ...], tmp_path: Path
) -> None:
    bundle = export(OwnModel(module, given), tmp_path / "b")

    shuffled = [check.inputs.endswith("in another order") for check in bundle.manifest.verification]
    assert not shuffled[0]
    assert any(shuffled)
    assert_bundle_is(bundle, module, *given)


def test_a_module_that_is_defined_for_its_example_only(tmp_path: Path) -> None:
    given = torch.arange(1.0, 9.0)[None]
    with pytest.raises(VerificationError, match="on random inputs, torch returns NaN"):
        export(OwnModel(Computes(lambda x: torch.sqrt(x.diff())), (given,)), tmp_path / "b")


class Joined(nn.Module):
    """200 tokens and 51 latents are 251, the first prime that stands for a number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.layer = nn.Parameter(torch.randn(51, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.layer(torch.cat([x, self.latents.expand(x.shape[0], -1, -1)], 1))
        heads = rows.view(x.shape[0], 251, 2, 4).transpose(1, 2)
        found: Tensor = (torch.softmax(heads @ heads.transpose(-1, -2), -1) @ heads).sum((1, 2))
        return found


class Repeated(nn.Module):
    """Latents, keys and values of their own for each sample, by Tile."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 6, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.repeat(x.shape[0], 1, 1)
        found: Tensor = latents + self.attention(latents, x, x)[0]
        return found


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Computes(lambda x: functional.interpolate(x, size=(16, 16), mode="bilinear").mean((2, 3))), (3, 8, 8)),
        (Joined(), (200, 8)),
        (Repeated(), (20, 8)),
        (Computes(lambda x: torch.sub(*torch.cat([x, 2 * x]).split([len(x), len(x)])).sort(0)[0]), (8,)),
        (Computes(lambda x: 2 * functional.pad(torch.cat([x, x]), (0, 0, 0, -len(x)))), (8,)),
    ],
    ids=["resize", "251 rows", "repeated latents", "split and sort", "pad"],
)
def test_any_number_of_samples(module: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    bundle = export(OwnModel(module, (torch.rand(2, *shape),)), tmp_path / "b", RANGE)

    assert_bundle_is(bundle, module, torch.rand(3, *shape))


@pytest.mark.parametrize(
    ("function", "datum"),
    [
        (lambda x: x * x.shape[0], "differs"),
        (lambda x: torch.ones(len(x), len(x)).tril() @ x, "does not run"),
        (lambda x: x[torch.arange(len(x)), x.argmax(-1)], "Concat_1 reads a constant with a number for each sample"),
    ],
    ids=["factor", "square", "rows"],
)
def test_the_number_of_samples_as_a_number(function: Callable[[Tensor], Tensor], datum: str, tmp_path: Path) -> None:
    with pytest.raises((UnsupportedModelError, VerificationError), match=datum) as raised:
        export(OwnModel(Computes(function), (torch.rand(2, 4),)), tmp_path / "b", RANGE)
    assert "give one number as --batch" in raised.value.hint


def test_an_input_with_the_name_of_a_folds_value(tmp_path: Path) -> None:
    class Fold(nn.Module):
        def forward(self, fold_0: Tensor) -> Tensor:
            return fold_0.reshape(fold_0.shape[0], 1, 4).expand(fold_0.shape[0], 5, 4) * 2

    bundle = export(OwnModel(Fold(), (torch.rand(2, 4),)), tmp_path / "b", RANGE)
    assert_bundle_is(bundle, Fold(), torch.rand(3, 4))


class Branches(nn.Module):
    """torch.export stops at the buffer's numbers before it sees the branch."""

    def __init__(self, on_values: bool) -> None:
        super().__init__()
        self.on_values, self.layer = on_values, nn.Linear(4, 4)
        self.register_buffer("gain", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        gain = float(self.gain.numpy().sum()) * float(self.gain.sum())  # type: ignore[operator]
        assert x.shape[0] == 2
        if self.on_values and x.abs().max() > 1e4:
            x = x / 1e4
        found: Tensor = self.layer(x) * gain
        return found


def test_a_branch_behind_another_failure_of_torch_export(tmp_path: Path) -> None:
    given = torch.rand(2, 4)
    with pytest.raises(ExportError, match="values of its inputs"):
        export(OwnModel(Branches(on_values=True), (given,)), tmp_path / "b")

    module = Branches(on_values=False)
    assert_bundle_is(export(OwnModel(module, (given,)), tmp_path / "b"), module, given)


def test_a_file_whose_weights_have_a_size_that_stands_for_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    body = "(float[n,8] x) => (float[n,4] y) { a = MatMul(x, v)  r = Relu(a)  y = MatMul(r, w) }"
    path = write(tmp_path / "m.onnx", body, v=rng.random((8, 502), np.float32), w=rng.random((502, 4), np.float32))

    with load(export(path, tmp_path / "b", RANGE)) as runtime:
        assert runtime.run({"x": np.ones((3, 8), np.float32)})["y"].shape == (3, 4)


def test_a_bound_that_stands_for_samples(tmp_path: Path) -> None:
    body = "(float[n,300] x) => (float[n,1] y) { a = Slice(x, zero, end, one)  y = ReduceMax(a, one) }"
    zero, end, one = (np.array([bound]) for bound in (0, 251, 1))
    path = write(tmp_path / "m.onnx", body, zero=zero, end=end, one=one)

    with load(export(path, tmp_path / "b", RANGE)) as runtime:
        found = runtime.run({"x": np.arange(900, dtype=np.float32).reshape(3, 300)})["y"]
    assert found.tolist() == [[250], [550], [850]]


def test_a_grid_for_any_number_of_samples(tmp_path: Path) -> None:
    body = """(float[n,2,3] x) => (float[n,8,8,2] y) {
        n = Shape<start = 0, end = 1>(x)  size = Concat<axis = 0>(n, rest)  y = AffineGrid(x, size)
    }"""
    path = write(tmp_path / "m.onnx", body, rest=np.array([3, 8, 8]))

    with load(export(path, tmp_path / "b", RANGE)) as runtime:
        assert runtime.run({"x": np.ones((3, 2, 3), np.float32)})["y"].shape == (3, 8, 8, 2)


@pytest.mark.parametrize(("to", "known"), [(TensorProto.BOOL, None), (TensorProto.INT32, (0, 1))])
def test_narrowed_integers_have_no_vocabulary(to: int, known: tuple[int, int] | None, tmp_path: Path) -> None:
    nodes = f"narrow = Cast<to = {to}>(x)  row = Cast<to = 7>(narrow)  y = Gather(table, row)"
    table, body = np.array([[1.0], [2.0]], np.float32), f"(int64[n,3] x) => (float[n,3,1] y) {{ {nodes} }}"
    bundle = export(write(tmp_path / "m.onnx", body, table=table), tmp_path / "b")

    assert bundle.manifest.parts["model"].inputs[0].values == known


def test_what_torch_writes_past_python_is_not_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
    with pytest.raises(ExportError, match="No ONNX function") as raised:
        export(OwnModel(module, (torch.rand(1, 8),)), tmp_path / "b")
    assert "remove_parametrizations" in raised.value.hint
    assert capfd.readouterr() == ("", "")


def test_shapes_that_onnx_cannot_infer_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = torch.rand(2, 2, 8, 4)  # torch repeats neither these nor the queries' batch as ONNX does
    attention = Computes(
        lambda k: functional.scaled_dot_product_attention(torch.ones(1, 4, 8, 4), k, k, enable_gqa=True)
    )
    with contextlib.suppress(PerceiverExportError):
        export(OwnModel(attention, (keys,)), tmp_path / "b")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class InHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8).half()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.half())
        return found.float()


def test_a_layer_in_half_precision_is_no_bug_of_the_graph(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="differs") as raised:
        export(OwnModel(InHalf(), (100 * torch.rand(2, 8),)), tmp_path / "b")
    assert "the whole module with .float()" in raised.value.hint


class EncodesAndDecodes(nn.Module):
    """Several outputs, none of whose names is a file's on all machines, or alone."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.queries = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(20, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latents = functional.scaled_dot_product_attention(self.latents.expand(x.shape[0], -1, -1), x, x)
        rows = functional.scaled_dot_product_attention(self.queries.expand(x.shape[0], -1, -1), latents, latents)
        return {"a/b": rows, "a:b": rows + 1, "A_b": rows + 2, "c.": rows + 3, "d" * 200: rows + 4}


def test_decoders_are_files_whatever_their_outputs_are_called(tmp_path: Path) -> None:
    module, points = EncodesAndDecodes().eval(), torch.rand(1, 50, 8)
    bundle = export(OwnModel(module, points), tmp_path / "b", ExportOptions(split=True))

    encoder, *decoders = bundle.manifest.parts
    assert decoders == ["decoder_a_b", "decoder_a_b_", "decoder_A_b__", "decoder_c_", f"decoder_{'d' * 150}"]
    with load(bundle, part=encoder) as first, load(bundle, part="decoder_A_b__") as second:
        found = decode(second, first.run({"x": points.numpy()}), [3])
    np.testing.assert_allclose(found, module(points)["A_b"].detach().numpy()[:, [3]], atol=1e-5)
