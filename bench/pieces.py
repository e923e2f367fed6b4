#!/usr/bin/env python3
"""Pieces of this program's own work, each made ready in a folder and then done again and again.

`bench/test_speed.py` times them here and now, `bench/compare.py` on two versions in turns: there
this file is run as `python bench/pieces.py NAME`, with the version's own code on the path. It
makes the piece ready, says so, and does it once for every line on its standard input. So it may
only use what old versions have, too; a version that lacks it is told, not compared.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Work = Callable[[], object]
SIDE, SAMPLES, CALLS = 32, 48, 400

RECIPE = """\
[model]
name = "speed"
version = "1"
source = "model.onnx"
[model.inputs.x]
shape = ["batch", 3, 32, 32]
typical = [1, 3, 32, 32]
[data]
calibration = "calibration.npz"
evaluation = "evaluation.npz"
metric = "score.py:score"
[quantize]
scope = "full"
"""

SCORE = """\
def score(run, data):
    return float(sum(run({"x": x[None]})[0].argmax() == y for x, y in zip(data["x"], data["y"])))
"""


def make(folder: Path, blocks: int = 6) -> Path:
    """A small residual network with random weights, its recipe and data; the recipe's path."""
    rng = np.random.default_rng(0)
    wide, nodes, tensors, flow = 32, [], [], "x"

    def conv(name: str, source: str, ins: int, stride: int = 1) -> str:
        weight = rng.normal(0, 1 / np.sqrt(9 * ins), (wide, ins, 3, 3)).astype(np.float32)
        tensors.append(numpy_helper.from_array(weight, f"{name}.w"))
        tensors.append(numpy_helper.from_array(np.zeros(wide, np.float32), f"{name}.b"))
        words = {"pads": [1, 1, 1, 1], "strides": [stride, stride], "name": name}
        nodes.append(helper.make_node("Conv", [source, f"{name}.w", f"{name}.b"], [name], **words))
        nodes.append(helper.make_node("Relu", [name], [f"{name}.y"], name=f"{name}.relu"))
        return f"{name}.y"

    flow = conv("first", flow, 3, 2)
    for k in range(blocks):
        inner = conv(f"{k}.b", conv(f"{k}.a", flow, wide), wide)
        nodes.append(helper.make_node("Add", [flow, inner], [f"{k}.y"], name=f"{k}.add"))
        flow = f"{k}.y"
    head = rng.normal(0, 0.2, (wide, 10)).astype(np.float32)
    tensors.append(numpy_helper.from_array(head, "head.w"))
    nodes.append(helper.make_node("GlobalAveragePool", [flow], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"))
    nodes.append(helper.make_node("MatMul", ["flat", "head.w"], ["scores"], name="head"))
    shapes = {"x": ["batch", 3, SIDE, SIDE], "scores": ["batch", 10]}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph(nodes, "speed", ends[:1], ends[1:], tensors)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "model.onnx")
    inputs = rng.normal(0, 1, (SAMPLES, 3, SIDE, SIDE)).astype(np.float32)
    np.savez(folder / "calibration.npz", x=inputs)
    np.savez(folder / "evaluation.npz", x=inputs, y=np.zeros(SAMPLES, np.int64))
    (folder / "score.py").write_text(SCORE)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def stage(name: str) -> Callable[[Path], Work]:
    """A stage as a build runs it: its child process and the imports in it are part of it."""

    def ready(folder: Path) -> Work:
        from edgewright.build import run_stages
        from edgewright.recipe import load_recipe
        from edgewright.target import load_target

        recipe, target = load_recipe(make(folder)), load_target("cpu")
        model = folder / "model.onnx"
        models = {"export": model, "newest": model}
        return lambda: run_stages([name], recipe, target, models=models)

    return ready


def calibration(folder: Path) -> Work:
    """SAMPLES samples through the calibration, every activation of the model watched."""
    from edgewright import model as graph
    from edgewright.data import samples
    from edgewright.quantize.calibrate import collect
    from edgewright.recipe import load_recipe

    recipe = load_recipe(make(folder))
    model = graph.load(folder / "model.onnx")
    feeds = list(samples(recipe, graph.input_specs(model)))
    tensors = ["x", *(name for node in model.graph.node for name in node.output)]
    return lambda: collect(model, tensors, lambda: feeds)


def runner(folder: Path) -> Work:
    """CALLS calls of a model through the child process that measures and validates."""
    from edgewright.runtime.session import Session

    make(folder, blocks=1)
    session = Session(folder / "model.onnx")
    feed = {"x": np.zeros((1, 3, SIDE, SIDE), np.float32)}
    return lambda: [session.run(feed) for _ in range(CALLS)]


def bare(folder: Path) -> Work:
    """The same calls in a loop around the runtime: what `runner` is compared with."""
    import onnxruntime

    make(folder, blocks=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    feed = {"x": np.zeros((1, 3, SIDE, SIDE), np.float32)}
    return lambda: [session.run(None, feed) for _ in range(CALLS)]


def start(folder: Path) -> Work:
    """The command line from nothing to its help."""
    command = [sys.executable, "-m", "edgewright", "--help"]
    return lambda: subprocess.run(command, check=True, capture_output=True, cwd=folder)


PIECES: dict[str, Callable[[Path], Work]] = {
    "start": start,
    "export": stage("export"),
    "simplify": stage("simplify"),
    "quantize": stage("quantize"),
    "validate": stage("validate"),
    "bundle": stage("bundle"),
    "calibration": calibration,
    "runner": runner,
}


def cpu_s() -> float:
    """CPU seconds of this process and of its children, those that ended and those at work."""
    parts = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts) + sum(map(at_work_s, children()))


def children() -> list[str]:
    """The process ids of the children."""
    return " ".join(p.read_text() for p in Path("/proc/self/task").glob("*/children")).split()


def at_work_s(pid: str) -> float:
    """CPU seconds of a process that runs, in nanoseconds where the kernel counts them."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in tasks) / 1e9


def main() -> int:
    """Do the piece that the command line names once for each line of standard input."""
    with tempfile.TemporaryDirectory(prefix="edgewright-speed-") as folder:
        work = PIECES[sys.argv[1]](Path(folder))
        print("ready", flush=True)
        for _ in sys.stdin:
            cpu, wall = cpu_s(), time.perf_counter()
            work()
            times = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s() - cpu}
            print(json.dumps(times), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
