#!/usr/bin/env python3
"""How often does the gate of a release raise a false alarm, and what does it catch?

    python bench/gate_power.py --neighbours 2 [--minutes 60]     run, resumable
    python bench/gate_power.py --table                           what is known so far

Every run is `edgewright gate` as a user starts it, a model against another: the same network
(A/A), one with an extra real operator of known relative cost (calibrated by measurement: +5 %,
+10 %), and one with a table of weights that costs 2 % more memory. Busy neighbours are started
here, as many as asked for, and end with the bench. Raw results are appended to a JSON Lines file,
with the commit and the load of the machine; only runs of one commit and one setting are counted
together. --nice: on a machine that is busier than wanted, the priority of the gate (not of the
neighbours), so that its share of a core is that beside fewer of them.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgewright.measure import host, race, statistics, summary
from edgewright.runtime.launch import host_cpu, launch_for
from edgewright.target import load_target

RESULTS = Path(__file__).parent / "results" / "gate_power.jsonl"
SIZE, CHANNELS, BLOCKS = 64, 32, 6
PLAN = {"aa": 150, "slow5": 60, "slow10": 20, "memory2": 20}
SLOWDOWNS = {"slow5": 1.05, "slow10": 1.10}
NEIGHBOUR = """
import os, sys, numpy
field = numpy.ones(1 << 20)
while os.getppid() == int(sys.argv[1]):  # whatever becomes of the bench
    field = field * 1.0000001
    sum(range(200_000))
"""
Row = dict[str, Any]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="Stop after these.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="Default: that of this checkout.")
    parser.add_argument("--table", action="store_true", help="Only print the table.")
    for kind, runs in PLAN.items():
        parser.add_argument(f"--{kind}", type=int, default=runs, metavar="RUNS")
    asked = parser.parse_args()
    rows = read(asked.results)
    if asked.table:
        print(table(rows, asked.commit))
        return 0
    commit = asked.commit or this_commit()
    setting = {"commit": commit, "neighbours": asked.neighbours, "nice": asked.nice}
    plan = {kind: getattr(asked, kind) for kind in PLAN}
    end = time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory(prefix="gate-power-") as name, neighbours(asked.neighbours):
        folder = Path(name)
        costs = calibration(rows, commit, folder, asked.results)
        models = make_models(folder, costs)
        while time.monotonic() < end:
            kind = next_kind(of(read(asked.results), setting), plan)
            if kind is None:
                break
            row = judge(kind, models, asked.nice)
            append(asked.results, {**row, **setting})
            print(json.dumps(row), file=sys.stderr)
    print(table(read(asked.results), commit))
    return 0


def read(path: Path) -> list[Row]:
    """The rows of earlier runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """One more row, on disk before the next run starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")


def this_commit() -> str:
    """The commit that is checked out; a changed tree has none."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    changed = git("status", "--porcelain", "--", "../pipeline")
    if changed:
        raise SystemExit(f"commit first, so that the results have a commit:\n{changed}")
    return git("rev-parse", "--short=10", "HEAD")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Busy processes that want a core each, for as long as this lasts."""
    words = [sys.executable, "-c", NEIGHBOUR, str(os.getpid())]
    busy = [subprocess.Popen(words) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def network(path: Path, *, rows: int = 0, table: int = 0, doc: str = "") -> Path:
    """A small CNN. rows: an extra convolution over as many rows of its last feature map.

    table: floats of a table of which one is read. What is extra reaches the output, times 1e-30.
    """
    rng = np.random.default_rng(0)
    weights, nodes, name, depth = [], [], "x", 3

    def constant(key: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values, key))
        return key

    def node(op: str, inputs: list[str], output: str, **more: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **more))
        return output

    def filters(key: str, depth: int) -> str:
        values = rng.normal(0, (9 * depth) ** -0.5, (CHANNELS, depth, 3, 3))
        return constant(key, values.astype(np.float32))

    for k in range(BLOCKS):
        name = node("Conv", [name, filters(f"w{k}", depth)], f"conv{k}", pads=[1, 1, 1, 1])
        name, depth = node("Relu", [name], f"relu{k}"), CHANNELS
    last = name
    name = node("Flatten", [node("GlobalAveragePool", [last], "pool")], "flat")
    head = constant("head", rng.normal(size=(CHANNELS, 10)).astype(np.float32))
    name = node("MatMul", [name, head], "scores")
    tiny = constant("tiny", np.float32(1e-30)) if rows or table else ""
    if rows:
        ends = [constant(f"cut{k}", np.array([v])) for k, v in enumerate((0, rows, 2))]
        part = node("Slice", [last, *ends], "part")
        extra = node("Conv", [part, filters("slow", depth)], "extra", pads=[1, 1, 1, 1])
        mean = node("ReduceMean", [extra], "mean", keepdims=0)
        name = node("Add", [name, node("Mul", [mean, tiny], "little")], "with_extra")
    if table:
        best = node("ArgMax", [name], "best", axis=1, keepdims=0)
        entries = constant("table", rng.normal(size=table).astype(np.float32))
        found = node("Gather", [entries, best], "found")
        name = node("Add", [name, node("Mul", [found, tiny], "trace")], "with_table")
    node("Identity", [name], "y")
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", floats, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", floats, [1, 10])],
        weights,
        doc_string=doc,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def calibration(rows: list[Row], commit: str, folder: Path, results: Path) -> dict[str, int]:
    """Rows of the extra convolution for each slowdown, and floats of the table.

    They depend on the network and the CPU, not on the gate, and are taken over from other commits.
    """
    base = network(folder / "base.onnx")
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    for row in calibrations(rows, digest):
        return dict(row["costs"])
    per_row = slope(base, folder)
    costs, found = {}, {}
    for kind, wanted in SLOWDOWNS.items():
        costs[kind] = round((wanted - 1) / per_row)
        for _ in range(3):
            found[kind] = cost(base, network(folder / f"{kind}.onnx", rows=costs[kind]), 6)
            missing = (wanted - found[kind]["ratio"]) / per_row
            if abs(missing) < 0.75:
                break
            costs[kind] += round(missing)
    costs["memory2"] = math.ceil(0.02 * 1024 * found["slow5"]["peak_kib"] / 4)
    tried = cost(base, network(folder / "table.onnx", table=costs["memory2"]), 2)["memory"]
    costs["memory2"] = math.ceil(costs["memory2"] * 0.02 / (tried - 1))
    found["memory2"] = cost(base, network(folder / "table.onnx", table=costs["memory2"]), 3)
    append(
        results,
        {
            "kind": "calibration",
            "commit": commit,
            "network": digest,
            "costs": costs,
            "found": found,
            **where(),
        },
    )
    return costs


def calibrations(rows: list[Row], network: str = "") -> list[Row]:
    """Those of this CPU, and of this network if it is named."""
    chosen = [r for r in rows if r["kind"] == "calibration" and r["cpu"] == host_cpu()]
    return [r for r in chosen if not network or r["network"] == network]


def slope(base: Path, folder: Path) -> float:
    """Relative cost of one more row of the extra convolution, from one of half the rows."""
    half = SIZE // 2
    return (cost(base, network(folder / "half.onnx", rows=half), 4)["ratio"] - 1) / half


def cost(base: Path, other: Path, launches: int) -> Row:
    """CPU time of a call, other / base, over many launches: the median with its 95 % bounds."""
    target = load_target("cpu")
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)} for _ in range(8)]
    cores = host.core_sets(sorted(os.sched_getaffinity(0)), 1)
    heats = []
    with host.exclusive(lambda *_: None):
        for k in range(launches):
            heats += race.run_launch(
                k,
                {race.CANDIDATE: other, race.ORIGINAL: base},
                feeds,
                target,
                launch_for(target),
                cores[k % len(cores)],
                3.0,
                k,
                lambda pairs: None,
                race.Pace(slice_s=0.015, pairs=(24, 60)),
            )
    logs = summary.balanced(heats, "cpu")
    assert logs is not None
    pooled = statistics.launch_ratio(logs)
    each = [round(math.exp(float(np.median(values))), 4) for values in logs]
    peaks = {s: max(heat["start"][s]["peak_kib"] for heat in heats) for s in race.SIDES}
    ratio = round(peaks[race.CANDIDATE] / peaks[race.ORIGINAL], 4)
    return {**pooled, "launches": each, "peak_kib": peaks[race.ORIGINAL], "memory": ratio}


def make_models(folder: Path, costs: dict[str, int]) -> dict[str, Path]:
    """The baseline, and a candidate of each kind."""
    return {
        "base": network(folder / "base.onnx"),
        "aa": network(folder / "aa.onnx", doc="another file of the same network"),
        "slow5": network(folder / "slow5.onnx", rows=costs["slow5"]),
        "slow10": network(folder / "slow10.onnx", rows=costs["slow10"]),
        "memory2": network(folder / "memory2.onnx", table=costs["memory2"]),
    }


def of(rows: list[Row], setting: Row) -> list[Row]:
    """The runs of one setting: commit, neighbours, nice."""
    runs = [row for row in rows if row["kind"] in PLAN]
    return [row for row in runs if all(row.get(k, 0) == v for k, v in setting.items())]


def next_kind(rows: list[Row], plan: dict[str, int]) -> str | None:
    """The kind that is farthest behind its plan; None where all is done."""
    done = {k: sum(r["kind"] == k for r in rows) for k in plan}
    open_kinds = [k for k in plan if done[k] < plan[k]]
    return min(open_kinds, key=lambda k: (done[k] + 1) / plan[k], default=None)


def judge(kind: str, models: dict[str, Path], nice: int) -> Row:
    """One run of the command: its verdict, seconds from start to end, and what it rests on."""
    words = ["gate", "--candidate", models[kind], "--baseline", models["base"], "--json"]
    before = where()
    begin = time.monotonic()
    command = ["nice", "-n", str(nice), sys.executable, "-m", "edgewright", *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if ran.returncode not in (0, 1, 4):
        raise SystemExit(f"edgewright gate ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    reports = json.loads(ran.stdout)
    checks = {c["name"]: c for c in reports["gate"]["checks"]}
    measure = reports["measure"]
    return {
        "kind": kind,
        "verdict": reports["gate"]["verdict"],
        "failed": sorted(n for n, c in checks.items() if c["verdict"] == "FAIL"),
        "open": sorted(n for n, c in checks.items() if c["verdict"] == "INCONCLUSIVE"),
        "seconds": round(seconds, 2),
        "latency": [checks["latency"][key] for key in ("low", "value", "high")],
        "cold_start": [checks["cold_start"][key] for key in ("low", "value", "high")],
        "memory": checks["memory"]["value"],
        "launch_ratios": [round(r, 4) for r in measure["latency"]["launch_ratios"]],
        "pairs": measure["latency"]["pairs"],
        "looks": [look["seconds"] for look in measure["decided"]["looks"]],
        "run_queue_share": round(measure["noise"]["run_queue_share"], 3),
        "steal_ticks": measure["noise"]["steal_ticks"],
        **before,
        "load_after": round(os.getloadavg()[0], 2),
    }


def where() -> Row:
    """When, and how busy the machine was before."""
    return {
        "load_before": round(os.getloadavg()[0], 2),
        "cores": os.cpu_count(),
        "cpu": host_cpu(),
    }


def table(rows: list[Row], commit: str = "") -> str:
    """The table of the docs, of the newest commit or of the one named; exact 95 % bounds."""
    runs = [r for r in rows if r["kind"] in PLAN and r["commit"] == (commit or r["commit"])]
    if not runs:
        return "no runs yet"
    setting = {key: runs[-1].get(key, 0) for key in ("commit", "neighbours", "nice")}
    chosen = of(rows, setting)
    lines = [
        f"Commit {setting['commit']}, {len(chosen)} verdicts beside {setting['neighbours']} "
        f"neighbours, nice {setting['nice']}.",
        "",
        "| candidate | true ratio | runs | FAIL | INCONCLUSIVE | PASS | seconds, median (most) "
        "| load, median (most) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = next((r["found"] for r in rows if r["kind"] == "calibration"), {})
    for kind in PLAN:
        runs = [r for r in chosen if r["kind"] == kind]
        if not runs:
            continue
        wanted = "memory" if kind == "memory2" else "latency"
        hits = sum(wanted in r["failed"] if kind != "aa" else r["verdict"] == "FAIL" for r in runs)
        seconds, loads = ([r[key] for r in runs] for key in ("seconds", "load_after"))
        caught = f"{hits} ({share(hits, len(runs))})"
        lines.append(
            f"| {kind} | {truth(kind, found, runs)} | {len(runs)} | {caught}"
            f" | {sum(r['verdict'] == 'INCONCLUSIVE' for r in runs)}"
            f" | {sum(r['verdict'] == 'PASS' for r in runs)}"
            f" | {np.median(seconds):.0f} ({max(seconds):.0f})"
            f" | {np.median(loads):.1f} ({max(loads):.1f}) |"
        )
    return "\n".join(lines)


def truth(kind: str, found: dict[str, Any], runs: list[Row]) -> str:
    """What the candidate really costs, as it was calibrated."""
    if kind == "aa":
        return "1 (the same network)"
    if kind == "memory2":
        return f"memory {np.median([r['memory'] for r in runs]):.3f}"
    one = found[kind]
    return f"CPU time {one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def share(hits: int, runs: int) -> str:
    """The share and its exact 95 % bounds (Clopper and Pearson)."""
    from scipy.stats import binomtest

    bounds = binomtest(hits, runs).proportion_ci(0.95, method="exact")
    return f"{hits / runs:.1%}, {bounds.low:.1%} to {bounds.high:.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
