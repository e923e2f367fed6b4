#!/usr/bin/env python3
"""Prune models of the measuring kit without labels or training, and score what is left.

    python bench/prune_kit.py --kit ../shared/kit [CASE:SHARE ...] [--samples 64] [--json]

Per row: the share of multiply-accumulates that remains, the metric kept by the plain slice and
after compensation (scored by the kit's own tool), the distance from the original on
evaluation inputs, CPU and wall seconds of scoring and of
compensation, peak memory of the process. More samples than the kit has are the same ones again:
that shows memory, not quality.
"""

import argparse
import importlib.util
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgewright.data import samples
from edgewright.model import input_specs, parameter_count
from edgewright.prune.costs import Costs
from edgewright.prune.criteria import scores
from edgewright.prune.cut import cut
from edgewright.prune.labels import analyse
from edgewright.prune.outputs import closed
from edgewright.prune.prepare import prepared
from edgewright.prune.select import select
from edgewright.recipe import Distillation, load_recipe
from edgewright.recover.compensate import compensate
from edgewright.recover.variants import with_variants
from edgewright.runtime.local import open_local
from edgewright.taps import expose

WANTED = {  # of issue 4: case, share of work that remains, share of the metric to keep
    ("ppocrv4-rec", 0.66): 96,
    ("ppocrv4-rec", 0.52): 89,
    ("ppocrv4-det", 0.75): 97,
    ("efficientnet-lite0", 0.8): 97,
    ("all-minilm-l6-v2", 0.7): 97,
}
LOOKED = 200  # runs on evaluation samples that distances are taken from
Row = dict[str, Any]


def main() -> int:
    """Command line; 1 if a row failed or kept less than wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="CASE:SHARE", help="default: those of issue 4")
    parser.add_argument("--kit", type=Path, default=Path("../shared/kit"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--vary", type=int, default=3, help="variants of each to compensate on")
    parser.add_argument("--criterion", default="hessian")
    parser.add_argument("--allocation", default="global", choices=("global", "uniform"))
    parser.add_argument("--multiple", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="score the plain slice, too")
    parser.add_argument("--distill", metavar="TABLE", help="[recover.distill] as JSON, {} for its "
                        "defaults: train what was compensated, and score that, too")  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="no scoring, time and memory only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not (asked.kit / "kit.py").is_file():
        print(f"no measuring kit in {asked.kit}: nothing to do", file=sys.stderr)
        return 0
    wanted = [tuple(r.rsplit(":", 1)) for r in asked.rows] or [(c, str(s)) for c, s in WANTED]
    if asked.child:
        print(json.dumps(prune(*wanted[0], asked)))
        return 0
    rows = [one_row(case, share, asked) for case, share in wanted]
    if asked.json:
        print(json.dumps(rows, indent=1))
    return 1 if any("error" in r or r.get("short") for r in rows) else 0


def one_row(case: str, share: str, asked: argparse.Namespace) -> Row:
    """Prune in a process of its own, whose memory is its own, and score the models."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"{case}:{share}", "--child", folder]
        for name in ("kit", "samples", "vary", "criterion", "allocation", "multiple"):
            command += [f"--{name}", str(getattr(asked, name))]
        if asked.distill:
            command += ["--distill", asked.distill]
        done = subprocess.run(command, capture_output=True, text=True)
        row: Row = {"case": case, "asked": float(share)}
        if done.returncode:
            row["error"] = done.stderr.strip().splitlines()[-1]
        else:
            row |= json.loads(done.stdout)
            models = ["plain"] * asked.plain + ["repaired"] + ["distilled"] * bool(asked.distill)
            models = [] if asked.memory else models
            for model in models:
                row[model] = kept(case, Path(folder) / f"{model}.onnx", asked.kit)
                row[f"{model}_distance"] = distance(case, Path(folder), model, asked.kit)
            goal = WANTED.get((case, float(share)))
            row["short"] = goal is not None and row.get("repaired", goal) < goal
    if not asked.json:
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def kept(case: str, model: Path, kit: Path) -> float:
    """Percent of the original's metric that a model keeps."""
    command = [
        sys.executable,
        str(kit / "kit.py"),
        "--root",
        str(kit),
        "score",
        case,
        str(model),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["retained_percent"])


def distance(case: str, folder: Path, name: str, kit: Path) -> float:
    """How far a model's first output is from the simplified original's (`recover.losses`), on what
    the first evaluation samples are run with, in the mean."""
    import torch

    from edgewright.recover.losses import find_target, output_loss

    spec = importlib.util.spec_from_file_location("score", kit / case / "score.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    models = [onnx.load(folder / f"{file}.onnx") for file in ("simple", name)]
    target = find_target(models[0], models[0].graph.output[0].name)
    plain = open_local(models[0].SerializeToString(), threads=1)
    sessions = [
        open_local(expose(m, [target.tensor]).SerializeToString(), threads=1) for m in models
    ]
    found: list[float] = []

    def run(feed: Any) -> Any:
        if len(found) < LOOKED:
            theirs, mine = (torch.from_numpy(s.run(feed, [target.tensor])[0]) for s in sessions)
            found.append(float(output_loss(target, mine, theirs, 1.0)))
        return plain.run(feed, None)

    with np.load(kit / case / "evaluation.npz") as data:
        getattr(module, "per_sample", module.score)(run, data)
    return round(float(np.mean(found)), 4)


def prune(case: str, share: str, asked: argparse.Namespace) -> Row:
    """Simplify, score, select, cut and compensate; writes plain.onnx and repaired.onnx."""
    recipe = load_recipe(asked.kit / case / "recipe.toml")
    simple = asked.child / "simple.onnx"
    command = ["-m", "edgewright", "simplify", str(asked.kit / case / "model.onnx"), "--recipe"]
    command += [str(asked.kit / case / "recipe.toml"), "-o", str(simple)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    model = prepared(onnx.load(simple))
    specs = input_specs(model)

    def feeds() -> Any:
        again = itertools.chain.from_iterable(samples(recipe, specs) for _ in itertools.count())
        return itertools.islice(again, asked.samples)

    def silent(text: str, done: int = 0, total: int = 0) -> None:
        pass

    sizes = {k: v.shape for k, v in next(iter(feeds())).items()}
    analysis = analyse(model)
    clock = [(time.monotonic(), time.process_time())]
    ranking = scores(model, analysis, asked.criterion, feeds, silent)
    costs = Costs(model, analysis, "macs", sizes)
    chosen = select(analysis, ranking, costs, float(share), asked.multiple, asked.allocation)
    clock.append((time.monotonic(), time.process_time()))
    smaller, left = cut(model, analysis, chosen.remove)
    onnx.save(smaller, asked.child / "plain.onnx")
    rows = compensate(model, smaller, left, lambda: with_variants(feeds(), asked.vary), silent)
    clock.append((time.monotonic(), time.process_time()))
    onnx.save(smaller, asked.child / "repaired.onnx")
    taught = trained(model, smaller, left, feeds, asked) if asked.distill else {}
    params = [parameter_count(m) for m in (smaller, closed(model))]
    spent = [[round(b - a, 1) for a, b in zip(*pair, strict=True)]
             for pair in itertools.pairwise(clock)]  # fmt: skip
    return {
        "macs": round(chosen.share, 4),
        "params": round(params[0] / params[1], 4),
        "samples": asked.samples,
        "vary": asked.vary,
        "repaired_layers": sum(not r["reason"] for r in rows),
        "plain_layers": sum(bool(r["reason"]) for r in rows),
        "scoring_s": spent[0][0],
        "scoring_cpu_s": spent[0][1],
        "compensation_s": spent[1][0],
        "compensation_cpu_s": spent[1][1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        **taught,
    }


def trained(
    model: onnx.ModelProto, smaller: onnx.ModelProto, left: Any, feeds: Any, asked: Any
) -> Row:
    """Distil the compensated model; writes distilled.onnx. How that went."""
    from edgewright.recover.distill import distill

    clock = time.monotonic(), time.process_time()
    settings = Distillation(**json.loads(asked.distill))
    told = distill(model, smaller, feeds, settings, kept=left)
    onnx.save(smaller, asked.child / "distilled.onnx")
    return {
        "distance": [round(told[k]["distance"], 4) for k in ("start", "best")],
        "solver": told["solver"],
        "best_step": f"{told['best_step']} of {told['steps']}",
        "rate": told["rate"],
        "training_s": round(time.monotonic() - clock[0]),
        "training_cpu_s": round(time.process_time() - clock[1]),
    }


if __name__ == "__main__":
    sys.exit(main())
