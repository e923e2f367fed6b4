#!/usr/bin/env python3
"""Does a pruned int8 model run faster than the unpruned one, and at which multiples of width?

    python bench/prune_speed.py --kit ../shared/kit [CASE] [--macs 0.56,0.27] [--multiples 1,4,8,16]

The case is pruned to the same share of every group (by `l2`: which units go does not change the
speed), brought to int8 in full, and both are timed against the unpruned int8 and float models:
all in one process on one thread, in turns of random order, CPU time. Prints the share of work and
of channels that remain, and the median speed-up over the unpruned model in the same type, and over
the float original, with 95 % bounds from the sign test. Models are kept in --out, not made again.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgewright.data import samples
from edgewright.model import input_specs, load
from edgewright.recipe import load_recipe
from edgewright.runtime.local import open_local
from edgewright.runtime.timing import spend

FIXED = """
[quantize]
scope = "full"
measure = false
corrections = false
max_samples = 8
"""
PRUNE = """
[prune]
budget = {{ macs = {macs} }}
criterion = "l2"
allocation = "uniform"
multiple = {multiple}
"""


def main() -> int:
    """Command line; 1 where a pruned model is slower than the unpruned one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", default="efficientnet-lite0")
    parser.add_argument("--kit", type=Path, default=Path("../shared/kit"))
    parser.add_argument("--macs", default="0.56,0.27")
    parser.add_argument("--multiples", default="1,4,8,16")
    parser.add_argument("--out", type=Path, default=Path("build/prune_speed"))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--target", default="cpu")
    asked = parser.parse_args()
    if not (asked.kit / "kit.py").is_file():
        print(f"no measuring kit in {asked.kit}: nothing to do", file=sys.stderr)
        return 0
    folder = asked.out / asked.case
    folder.mkdir(parents=True, exist_ok=True)
    simple = folder / "simple.onnx"
    recipe = recipe_with(asked.kit / asked.case, folder / "whole.toml", FIXED)
    if not simple.exists():
        edgewright("simplify", asked.kit / asked.case / "model.onnx", recipe, simple, asked.target)
    models = {("whole", "float"): simple}
    facts: dict[str, dict[str, Any]] = {}
    models["whole", "int8"] = int8_of(simple, folder / "whole.toml", asked.target)
    for macs in asked.macs.split(","):
        for multiple in asked.multiples.split(","):
            name = folder / f"macs{macs}-by{multiple}.onnx"
            text = FIXED + PRUNE.format(macs=macs, multiple=multiple)
            recipe = recipe_with(asked.kit / asked.case, name.with_suffix(".toml"), text)
            told = name.with_suffix(".json")
            if not told.exists():
                report = edgewright("prune", simple, recipe, name, asked.target)
                told.write_text(report)
            name_of = f"{macs} by {multiple}"
            facts[name_of] = json.loads(told.read_text())["prune"]
            models[name_of, "float"] = name
            models[name_of, "int8"] = int8_of(name, recipe, asked.target)
            print(f"{name.stem} is made", file=sys.stderr, flush=True)
    times = race(models, folder / "whole.toml", asked.rounds)
    print("| work asked, multiple | work, channels left | type | faster than the same unpruned |"
          " than the float original |\n|-|-|-|-|-|")  # fmt: skip
    slower = False
    for (cut, kind), mine in times.items():
        left, channels = kept(facts[cut]) if cut in facts else ("1", "1")
        same, first = (ratio(times["whole", k], mine) for k in (kind, "float"))
        shown = " | ".join(f"{m:.2f} [{low:.2f}, {high:.2f}]" for low, m, high in (same, first))
        print(f"| {cut} | {left}, {channels} | {kind} | {shown} |")
        slower |= cut != "whole" and same[2] < 1
    return 1 if slower else 0


def recipe_with(case: Path, path: Path, text: str) -> Path:
    """The case's recipe with more tables, its files named in full."""
    whole = (case / "recipe.toml").read_text()
    for file in ("model.onnx", "calibration.npz", "evaluation.npz", "score.py"):
        whole = whole.replace(f'"{file}', f'"{case.resolve() / file}')
    path.write_text(whole + text)
    return path


def edgewright(command: str, model: Path, recipe: Path, output: Path, target: str) -> str:
    """Run one stage; its JSON."""
    words = [sys.executable, "-m", "edgewright", command, model, "--recipe", recipe, "-o", output]
    words += ["--target", target, "--json"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} {model} failed: {done.stdout} {done.stderr}")
    return done.stdout


def int8_of(model: Path, recipe: Path, target: str) -> Path:
    """The model in int8, made where it is not there."""
    path = model.with_suffix(".int8.onnx")
    if not path.exists():
        edgewright("quantize", model, recipe, path, target)
    return path


def kept(report: dict[str, Any]) -> tuple[str, str]:
    """What the prune stage says of the work and of all units of all groups that remain."""
    channels = sum(g["kept"] for g in report["groups"]) / sum(g["units"] for g in report["groups"])
    return f"{report['budget']['left']:.2f}", f"{channels:.2f}"


def race(
    models: dict[tuple[str, str], Path], recipe: Path, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """CPU seconds of each model in each round of turns."""
    read = load_recipe(recipe)
    feeds = list(samples(read, input_specs(load(models["whole", "float"])), 4))
    sessions = {key: open_local(path) for key, path in models.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for key in order.sample(list(models), len(models)):
            spent = spend(sessions[key], feeds, 0.08)
            if turn:  # the first is to get warm
                times[key].append(spent)
    return times


def ratio(first: list[float], mine: list[float]) -> tuple[float, float, float]:
    """How many times as fast, round by round: see `bounds`."""
    return bounds([a / b for a, b in zip(first, mine, strict=True)])


def bounds(values: list[float]) -> tuple[float, float, float]:
    """The median between the order statistics that the sign test gives at 95 %."""
    n, tail, k = len(values), 0.5 ** len(values), 0
    while tail <= 0.025:
        k += 1
        tail += math.comb(n, k) / 2**n
    ranked = sorted(values)
    return ranked[max(k - 1, 0)], statistics.median(values), ranked[min(n - k, n - 1)]


if __name__ == "__main__":
    sys.exit(main())
