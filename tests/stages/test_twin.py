"""Signed models judged by their unsigned twin: the ARM kernels' answers, to the last bit.

Needs the emulator (`edgewright setup --target arm`) for what it compares with.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import tiny_model

from edgewright import quantize
from edgewright.errors import EnvironmentMissing
from edgewright.quantize.twin import unsigned_twin
from edgewright.recipe import load_recipe
from edgewright.runtime.launch import launch_for, open_on_target
from edgewright.runtime.local import open_local
from edgewright.stage import Job
from edgewright.target import Target, load_target


@pytest.fixture
def arm() -> Target:
    target = load_target("arm")
    try:
        launch_for(target)
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    return target


@pytest.fixture
def signed(tiny: Path, arm: Target) -> Path:
    """The tiny model in int8 as the arm profile wants it: signed activations."""
    folder = tiny.parent / "quantized"
    folder.mkdir()
    job = Job(
        recipe=load_recipe(tiny),
        target=arm,
        folder=folder,
        model=tiny.with_name("model.onnx"),
        models={"export": tiny.with_name("model.onnx")},
    )
    assert not quantize.run(job)["stayed_float"]
    return job.output_model()


def test_the_twin_says_here_what_the_model_says_there(signed: Path, arm: Target) -> None:
    model = onnx.load(signed)
    twin = unsigned_twin(model)
    onnx.checker.check_model(twin)
    x = np.random.default_rng(5).normal(0, 1, (1, 1, 12, 12)).astype(np.float32)
    with open_on_target(signed, arm) as session:
        there = session.run({"x": x})[0]
    here = open_local(twin.SerializeToString()).run({"x": x})[0]
    assert np.array_equal(here, there)


def test_only_activations_move(signed: Path) -> None:
    model = onnx.load(signed)
    twin = unsigned_twin(model)
    codes = {t.name: t for t in model.graph.initializer}
    for node, other in zip(model.graph.node, twin.graph.node, strict=True):
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            assert list(node.input) == list(other.input)  # weights and biases as they were
    float_model = tiny_model()
    assert unsigned_twin(float_model) is float_model
