"""What the tests share: a cache of their own, a tiny model with its recipe, the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

CLASSES, SAMPLES = 10, 96

SCORE = '''\
"""Accuracy of the tiny classifier."""

import numpy as np


def per_sample(run, data):
    pairs = zip(data["x"], data["y"])
    return np.array([float(run({"x": x[None]})[0].argmax() == y) for x, y in pairs])


def score(run, data):
    return float(per_sample(run, data).mean())
'''

RECIPE = """\
[model]
name = "tiny"
version = "1.0.0"
source = "model.onnx"

[model.inputs.x]
shape = ["batch", 1, 12, 12]
typical = [1, 1, 12, 12]

[data]
calibration = "calibration.npz"
evaluation = "evaluation.npz"
metric = "score.py:score"
per_sample = "score.py:per_sample"

[gate]
min_retained = 0.9
"""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for this run of the tests; nobody's own cache is read or filled."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["EDGEWRIGHT_CACHE"] = str(folder)
    os.environ.pop("SOURCE_DATE_EPOCH", None)
    return folder


def tiny_model() -> onnx.ModelProto:
    """Three convolutions and a classifier with random weights, batch size free."""
    rng = np.random.default_rng(1)
    tensors, nodes, channels, flow = [], [], 1, "x"
    for k, wide in enumerate((16, 32, 32)):
        weight = rng.normal(0, 1 / np.sqrt(9 * channels), (wide, channels, 3, 3))
        tensors += [
            numpy_helper.from_array(weight.astype(np.float32), f"w{k}"),
            numpy_helper.from_array(rng.normal(0, 0.1, wide).astype(np.float32), f"b{k}"),
        ]
        stride = [1, 1] if k == 0 else [2, 2]
        conv = helper.make_node(
            "Conv", [flow, f"w{k}", f"b{k}"], [f"c{k}"], pads=[1, 1, 1, 1], strides=stride
        )
        nodes += [conv, helper.make_node("Relu", [f"c{k}"], [f"r{k}"])]
        flow, channels = f"r{k}", wide
    head = rng.normal(0, 0.2, (channels * 9, CLASSES)).astype(np.float32)
    tensors.append(numpy_helper.from_array(head, "head"))
    nodes += [
        helper.make_node("Flatten", [flow], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 12, 12])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_tiny(folder: Path, recipe: str = RECIPE) -> Path:
    """The tiny model with data and recipe in `folder`; the recipe's path.

    Labels are what the model itself says, of the inputs it is surest about: int8 keeps them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model()
    onnx.save(model, folder / "model.onnx")
    rng = np.random.default_rng(2)
    inputs = rng.normal(0, 1, (6 * SAMPLES, 1, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    scores = session.run(None, {"x": inputs})[0]
    ranked = np.sort(scores, axis=1)
    sure = np.argsort(ranked[:, -2] - ranked[:, -1])[:SAMPLES]
    np.savez(folder / "calibration.npz", x=inputs[-48:])
    np.savez(folder / "evaluation.npz", x=inputs[sure], y=scores[sure].argmax(1))
    (folder / "score.py").write_text(SCORE)
    path = folder / "recipe.toml"
    path.write_text(recipe)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The recipe of the tiny model in a folder of this test's own."""
    return write_tiny(tmp_path / "tiny")


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*words: object) -> list[str]:
    """The words of an edgewright command."""
    return [sys.executable, "-m", "edgewright", *(str(word) for word in words)]


@pytest.fixture(scope="session")
def edgewright() -> Callable[..., Ran]:
    """Run an edgewright command as users do; `env` adds variables, other keywords as Popen's."""

    def run(*words: object, env: Mapping[str, str] = {}, timeout: float = 300, **more: Any) -> Ran:
        done = subprocess.run(
            command(*words),
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **more,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
