#!/usr/bin/env python3
"""Calibration against ONNX Runtime's own calibrators: samples per CPU second, peak memory.

    python bench/calibration.py [FOLDER ...] [--samples 64] [--memory 64 2048] [--rounds 3] [--json]

FOLDER holds recipe.toml and what it names, as in the measuring kit. The model goes through
`edgewright simplify` first, as in a build; all methods watch the tensors that our quantizer asks
for. Each run is a process of its own. Speed: CPU seconds from the loaded model and the samples
in memory to the ranges, methods in turns; each process has one core, so that no thread spins.
Memory: the highest resident size (VmHWM) of a process that reads samples as a build does, again
from the start until there are enough, with as many processes as a build would use.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

OURS = ("mse", "minmax", "percentile", "entropy")
THEIRS = ("MinMax", "Percentile", "Entropy")
Row = dict[str, Any]


def main() -> int:
    """Command line; 0 unless a folder cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 2048], metavar="SAMPLES")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(*asked.child)))
        return 0
    folders = asked.folders or [Path("../shared/kit/mobilenet-v2")]
    rows = []
    for folder in folders:
        if not (folder / "recipe.toml").is_file():
            print(f"no recipe.toml in {folder}: nothing to do", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as place:
            row = measure(folder.resolve(), Path(place) / "model.onnx", asked)
        rows.append(row)
        if not asked.json:
            show(row)
    if asked.json:
        print(json.dumps(rows, indent=1))
    return 0


def measure(folder: Path, model: Path, asked: argparse.Namespace) -> Row:
    """All figures of one model."""
    from edgewright.recipe import load_recipe

    recipe = folder / "recipe.toml"
    source = folder / load_recipe(recipe).model.source
    command = [sys.executable, "-m", "edgewright", "simplify", source, "--recipe", recipe]
    subprocess.run([*command, "-o", model], check=True, capture_output=True)
    place = [recipe, model]
    methods = [*(("ours", m) for m in OURS), *(("theirs", m) for m in THEIRS)]
    speed: dict[str, list[Row]] = {}
    for turn in range(asked.rounds):
        for side, method in methods if turn % 2 == 0 else methods[::-1]:
            print(f"{folder.name}: {side} {method}, round {turn + 1}", file=sys.stderr)
            speed.setdefault(f"{side} {method}", []).append(
                start("speed", side, method, asked.samples, *place)
            )
    memory = {}
    for count in asked.memory:
        print(f"{folder.name}: memory of {count} samples", file=sys.stderr)
        memory[count] = start("memory", count, *place)
    return {
        "model": folder.name,
        "model_bytes": source.stat().st_size,
        "samples": asked.samples,
        "speed": speed,
        "memory": memory,
        "bare": {what: start("bare", what) for what in ("onnxruntime", "edgewright.quantize")},
    }


def start(*words: Any) -> Row:
    """Run this file as a child; what it found."""
    command = [sys.executable, __file__, "--child", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: Row = json.loads(done.stdout)
    return found


def child(kind: str, *words: str) -> Row:
    """One measurement, in this process."""
    if kind == "bare":
        __import__(words[0])
        return {"peak_bytes": high_water("self")}
    if kind == "memory":
        return peak(int(words[0]), Path(words[1]), Path(words[2]))
    return speed_of(words[0], words[1], int(words[2]), Path(words[3]), Path(words[4]))


def task(recipe_file: Path, file: Path) -> tuple[Any, Any, list[str]]:
    """Recipe, model and the tensors that the quantizer wants to know of."""
    from edgewright import model as graph
    from edgewright.quantize import placement, ready
    from edgewright.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    model = ready(graph.load(file))
    wanted = set(placement.choose(model, recipe.quantize).nodes)
    floats, stored = placement.float_tensors(model), graph.initializers(model.graph)
    nodes = [n for n in model.graph.node if n.name in wanted]
    touched = [t for n in nodes for t in [*n.input, *n.output] if t in floats and t not in stored]
    return recipe, model, list(dict.fromkeys(touched))


def endless(recipe: Any, model: Any) -> Iterator[Any]:
    """The calibration samples, again from the start when they end."""
    from edgewright.data import samples
    from edgewright.model import input_specs

    specs = input_specs(model)
    return chain.from_iterable(samples(recipe, specs) for _ in repeat(None))


def cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    parts = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(p.ru_utime + p.ru_stime for p in parts)


def speed_of(side: str, method: str, count: int, recipe_file: Path, file: Path) -> Row:
    """CPU seconds of one calibration."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    recipe, model, tensors = task(recipe_file, file)
    feeds = list(islice(endless(recipe, model), count))
    if side == "theirs":
        import onnxruntime.quantization.calibrate  # noqa: F401 - not part of what is timed
    begin = cpu_s()
    found = (ours if side == "ours" else theirs)(recipe, model, file, tensors, feeds, method)
    return {"cpu_s": cpu_s() - begin, "tensors": len(found), "peak_bytes": high_water("self")}


def ours(recipe: Any, model: Any, file: Path, tensors: list[str], feeds: Any, method: str) -> Any:
    """Ranges by our calibrator."""
    from edgewright.quantize import ranges
    from edgewright.quantize.calibrate import collect

    found = collect(model, tensors, lambda: feeds)
    share = recipe.quantize.percentile
    return {name: ranges.choose(s, method, share, False) for name, s in found.items()}


def theirs(recipe: Any, model: Any, file: Path, tensors: list[str], feeds: Any, name: str) -> Any:
    """Ranges by one of the runtime's calibrators, watching the same tensors."""
    from onnxruntime.quantization import calibrate

    base = getattr(calibrate, f"{name}Calibrater")

    class Same(base):  # type: ignore[misc, valid-type]
        def select_tensors_to_calibrate(self, model: Any) -> Any:
            return set(tensors), super().select_tensors_to_calibrate(model)[1]

    class Reader(calibrate.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    # As its documentation has it: 2048 bins and 99.999 for Percentile, 128 bins for Entropy.
    options = {"MinMax": {}, "Percentile": {"num_bins": 2048}, "Entropy": {}}[name]
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = Same(str(file), None, str(file.with_suffix(f".{os.getpid()}")), **options)
        calibrator.augment_graph()
        calibrator.create_inference_session()
        calibrator.collect_data(Reader())
        return calibrator.compute_data().data


def high_water(pid: str) -> int:
    """Highest resident size of a process so far, in bytes; 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(text.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 0


def peak(count: int, recipe_file: Path, file: Path) -> Row:
    """Highest resident size of a calibration and of its helper processes."""
    recipe, model, tensors = task(recipe_file, file)
    children: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for listing in Path("/proc/self/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    for pid in listing.read_text().split():
                        children[pid] = max(children.get(pid, 0), high_water(pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin, cpu = time.monotonic(), cpu_s()
    feeds = islice(endless(recipe, model), count)
    ours(recipe, model, file, tensors, feeds, recipe.quantize.ranges)
    seconds, cpu = time.monotonic() - begin, cpu_s() - cpu
    done.set()
    watcher.join()
    return {
        "peak_bytes": high_water("self"),
        "helper_peak_bytes": list(children.values()),
        "wall_s": seconds,
        "cpu_s": cpu,
    }


def show(row: Row) -> None:
    """One model's figures for people."""
    mib = 1 << 20
    size = row["model_bytes"] / mib
    bare = ", ".join(f"{k} {v['peak_bytes'] / mib:.0f} MiB" for k, v in row["bare"].items())
    print(f"{row['model']}: {size:.1f} MiB; a process that only imported {bare}")
    print(f"  {row['samples']} samples on one core       samples per CPU s      tensors  peak MiB")
    for name, runs in row["speed"].items():
        rates = sorted(row["samples"] / r["cpu_s"] for r in runs)
        print(
            f"  {name:<30} {statistics.median(rates):7.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"
            f"  {runs[0]['tensors']:8d} {max(r['peak_bytes'] for r in runs) / mib:9.0f}"
        )
    for mine, other in (("percentile", "Percentile"), ("entropy", "Entropy"), ("minmax", "MinMax")):
        pairs = zip(row["speed"][f"ours {mine}"], row["speed"][f"theirs {other}"], strict=True)
        ratios = sorted(t["cpu_s"] / o["cpu_s"] for o, t in pairs)
        median = statistics.median(ratios)
        print(
            f"  {other}: ours is {median:.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    for count, figures in row["memory"].items():
        helpers = [f"{b / mib:.0f}" for b in figures["helper_peak_bytes"]]
        total = figures["peak_bytes"] + sum(figures["helper_peak_bytes"])
        print(
            f"  {count} samples: peak {figures['peak_bytes'] / mib:.0f} MiB, helpers "
            f"{' + '.join(helpers) or 'none'}, all {total / mib:.0f} MiB; model + 300 MB is "
            f"{size + 3e8 / mib:.0f} MiB; {figures['wall_s']:.1f} s, {figures['cpu_s']:.1f} CPU s"
        )


if __name__ == "__main__":
    sys.exit(main())
