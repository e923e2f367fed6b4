"""Distillation that knows it will be rounded: what int8 costs afterwards, by the real stage."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgewright import quantize
from edgewright.errors import BadInput
from edgewright.recipe import Distillation, parse_recipe
from edgewright.runtime.local import open_local
from edgewright.stage import Job
from edgewright.target import load_target

torch = pytest.importorskip("torch")

from edgewright.recover.distill import distill  # noqa: E402
from edgewright.recover.executor import to_module  # noqa: E402
from edgewright.recover.rounding import rounding_of, value_rounding, weight_rounding  # noqa: E402

INPUTS, HIDDEN, OUTPUTS = 24, 48, 6
X = np.random.default_rng(1).normal(size=(400, INPUTS)).astype(np.float32)
SETTINGS = Distillation(
    steps=400, rate=2e-3, batch=32, patience=99, feature=0, mix=False, threads=1
)


@pytest.fixture(scope="module")
def uneven() -> onnx.ModelProto:
    """Two layers whose hidden units differ 250-fold in size: one scale does not fit all."""
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]> g (float[N,{INPUTS}] x) => '
        f"(float[N,{OUTPUTS}] y) {{ h = Gemm <transB=1> (x, w, b) a = Relu (h)"
        " y = Gemm <transB=1> (a, v, c) }"
    )
    rng = np.random.default_rng(0)
    size = np.logspace(-1.2, 1.2, HIDDEN)
    values = {
        "w": rng.normal(0, INPUTS**-0.5, (HIDDEN, INPUTS)) * size[:, None],
        "b": np.zeros(HIDDEN),
        "v": rng.normal(0, HIDDEN**-0.5, (OUTPUTS, HIDDEN)) / size,
        "c": np.zeros(OUTPUTS),
    }
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype("f"), name))
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return onnx.shape_inference.infer_shapes(model)


def feeds():
    return ({"x": X[k : k + 1]} for k in range(300))


def int8(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    folder.mkdir()
    onnx.save(model, folder / "source.onnx")
    np.savez(folder / "calibration.npz", x=X[:300])
    raw = {
        "model": {"name": "m", "version": "1", "source": "source.onnx"},
        "data": {"calibration": "calibration.npz"},
        "quantize": {"scope": "full", "corrections": False, "ranges": "minmax"},
    }
    (folder / "out").mkdir()
    work = Job(
        recipe=parse_recipe(raw, folder), target=load_target("cpu"), folder=folder / "out",
        model=folder / "source.onnx",
    )  # fmt: skip
    quantize.run(work)
    return onnx.load(work.output_model())


def outputs(model: onnx.ModelProto) -> np.ndarray:
    return open_local(model.SerializeToString()).run({"x": X[300:]})[0]


def test_rounding_is_that_of_quantize_linear():
    x = torch.tensor([-0.3, 0.0, 0.004, 0.6, 0.7])
    # 0.9 in 255 steps, zero at 85: steps of 0.9 / 255; beyond the ends clipped.
    step = 0.9 / 255
    want = [-85 * step, 0, round(0.004 / step) * step, 170 * step, 170 * step]
    np.testing.assert_allclose(value_rounding(-0.3, 0.6)(x).numpy(), want, atol=1e-7)
    weight = torch.tensor([[1.27, 0.014], [0.5, -0.001]])
    found = weight_rounding(0)(weight).numpy()
    np.testing.assert_allclose(found, [[1.27, 0.01], [0.5, 0]], atol=1e-6)


def test_the_rounded_net_is_as_far_away_as_the_int8_file(uneven, tmp_path: Path) -> None:
    module = to_module(uneven)
    module.rounding = rounding_of(uneven, module, feeds())
    with torch.no_grad():
        (mine,) = module({"x": X[300:]})
    real, exact = outputs(int8(uneven, tmp_path / "q")), outputs(uneven)
    # Both lose much, and the same: what is left between them is rounding of bias and output.
    assert ((mine.numpy() - real) ** 2).mean() < 0.2 * ((real - exact) ** 2).mean()


def test_int8_costs_less_after_it(uneven, tmp_path: Path) -> None:
    exact, error, same = outputs(uneven), {}, {}
    for aware in (False, True):
        student = copy.deepcopy(uneven)
        report = distill(uneven, student, feeds, replace(SETTINGS, quantized=aware))
        found = outputs(int8(student, tmp_path / str(aware)))
        error[aware] = float(((found - exact) ** 2).mean())
        same[aware] = float((found.argmax(1) == exact.argmax(1)).mean())
    # Without it the student is its teacher and learns nothing. Measured: 0.84 of the error.
    assert error[True] < 0.95 * error[False] and same[True] >= same[False]
    assert 0 < report["best"]["distance"] < report["start"]["distance"]


def test_a_net_without_such_layers_is_refused() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N,6] x) => (float[N,6] y) {'
        " y = Mul (x, s) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones(6, np.float32), "s"))
    some = lambda: ({"x": X[k : k + 1, :6]} for k in range(20))  # noqa: E731
    with pytest.raises(BadInput, match="no layer that int8 rounds"):
        distill(model, copy.deepcopy(model), some, replace(SETTINGS, quantized=True))
