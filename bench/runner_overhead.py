#!/usr/bin/env python3
"""What our worker adds to a tight loop in C: latency of one model through both, in turns.

    python bench/runner_overhead.py [--launches 8] [--results FILE]

The loop in C is `edge-run --requests` on the same library of ONNX Runtime, with the same options.
Both are pinned to one core and take turns in random order, in slices of about 20 ms; what is
compared is the median CPU time of a slice's calls, pair by pair, as in the gate. Fresh processes
for every launch, started in either order. Models of about 0.2 ms and of about 20 ms.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgewright.measure import host, statistics
from edgewright.runtime.launch import host_cpu, session_options
from edgewright.runtime.session import Session
from edgewright.runtime.toolchain import host_library, runner
from edgewright.target import load_target

RESULTS = Path(__file__).parent / "results" / "runner_overhead.jsonl"
MODELS = {"0.2 ms": (24, 24, 3), "20 ms": (96, 48, 8)}  # size, channels, layers
SLICE_S, PAIRS, VECTORS = 0.02, 40, 4
SIDES = ("worker", "loop")


def main() -> int:
    """Command line; 1 where an overhead is shown to be above 2 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="runner-overhead-") as name:
        for label, (size, channels, layers) in MODELS.items():
            model = network(Path(name) / "model.onnx", size, channels, layers)
            inputs = Path(name) / "inputs.npz"
            rng = np.random.default_rng(1)
            feeds = [
                {"x": rng.normal(size=(1, 3, size, size)).astype(np.float32)}
                for _ in range(VECTORS)
            ]
            np.savez(inputs, **{f"x__{k:03d}": feed["x"] for k, feed in enumerate(feeds)})
            launches = [race(model, inputs, feeds, k) for k in range(asked.launches)]
            found.append(summary(label, launches))
            print(json.dumps(found[-1]), file=sys.stderr)
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    with asked.results.open("a") as file:
        file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in found)
    print("| model | loop in C, p50 CPU | worker / loop, CPU | bounds (95 %) | wall | load |")
    print("|---|---|---|---|---|---|")
    for row in found:
        cpu, wall = row["cpu"], row["wall"]
        print(
            f"| {row['model']} | {row['loop_ms']:.3f} ms | {cpu['ratio']:.4f}"
            f" | {cpu['low']:.4f} to {cpu['high']:.4f} | {wall['ratio']:.3f} | {row['load']} |"
        )
    return int(any(row["cpu"]["low"] > 1.02 for row in found))


def network(path: Path, size: int, channels: int, layers: int) -> Path:
    """A stack of convolutions and a mean."""
    rng = np.random.default_rng(0)
    nodes, weights, name, depth = [], [], "x", 3
    for k in range(layers):
        values = rng.normal(0, (9 * depth) ** -0.5, (channels, depth, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{k}"))
        nodes.append(helper.make_node("Conv", [name, f"w{k}"], [f"c{k}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"]))
        name, depth = f"r{k}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["y"]))
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, 1, 1]),
    ]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    return path


class Loop:
    """The loop in C, asked for slices."""

    def __init__(self, model: Path, inputs: Path, cores: frozenset[int]) -> None:
        options = session_options(load_target("cpu"))
        words = [runner("x86_64"), "--model", model, "--inputs", inputs]
        words += ["--library", host_library(), "--requests", "--warm-up", "30"]
        for key, value in options["session"].items():
            words += ["--config", f"{key}={value}"]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as the worker: the scheduler shares cores between sessions
        )
        os.sched_setaffinity(self.process.pid, cores)
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("edge-run ended early")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def slice(self, calls: int) -> dict[str, np.ndarray]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        answer = self.answer()
        return {clock: np.array(answer[f"{clock}_ns"]) / 1e9 for clock in ("cpu", "wall")}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Worker:
    """Our own worker, asked for slices."""

    def __init__(
        self, model: Path, feeds: list[dict[str, np.ndarray]], cores: frozenset[int]
    ) -> None:
        self.session = Session(model, cores=cores, **session_options(load_target("cpu")))
        self.session.keep_feeds(feeds)
        self.slice(30)

    def slice(self, calls: int) -> dict[str, np.ndarray]:
        answer = self.session.ask({"op": "slice", "seconds": 0, "min_runs": calls})[0]
        return {clock: np.array(answer[f"{clock}_s"]) for clock in ("cpu", "wall")}

    def close(self) -> None:
        self.session.close()


def race(
    model: Path, inputs: Path, feeds: list[dict[str, np.ndarray]], number: int
) -> dict[str, Any]:
    """Log-ratios worker / loop of the pairs of two fresh processes, and the loop's median."""
    cores = host.core_sets(sorted(os.sched_getaffinity(0)), 1)
    core = cores[number % len(cores)]
    order = random.Random(number)
    sides: dict[str, Any] = {}
    for side in SIDES if number % 2 else reversed(SIDES):
        sides[side] = Worker(model, feeds, core) if side == "worker" else Loop(model, inputs, core)
    try:
        each = float(np.median(sides["loop"].slice(20)["cpu"]))
        calls = max(4, min(200, math.ceil(SLICE_S / each)))
        logs: dict[str, list[float]] = {"cpu": [], "wall": []}
        loop = []
        for pair in range(PAIRS + 1):
            taken = {side: sides[side].slice(calls) for side in order.sample(SIDES, 2)}
            if pair == 0:
                continue
            loop.append(float(np.median(taken["loop"]["cpu"])))
            for clock, of in (("cpu", np.median), ("wall", np.min)):
                ratio = of(taken["worker"][clock]) / of(taken["loop"][clock])
                logs[clock].append(math.log(ratio))
    finally:
        for side in sides.values():
            side.close()
    return {"logs": logs, "loop_s": float(np.median(loop))}


def summary(label: str, launches: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios with bounds, the raw medians of the launches, and the load."""
    return {
        "model": label,
        "loop_ms": 1e3 * float(np.median([one["loop_s"] for one in launches])),
        **{
            clock: statistics.launch_ratio([one["logs"][clock] for one in launches])
            for clock in ("cpu", "wall")
        },
        "launches": [round(math.exp(float(np.median(one["logs"]["cpu"]))), 4) for one in launches],
        "load": round(os.getloadavg()[0], 1),
        "cpu_name": host_cpu(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
