#!/usr/bin/env python3
"""How much of a network the pruner reaches: parameters left when half of all units go.

    python bench/prune_reach.py [NAME ...] [--kit ../shared/kit] [--json]

Over the zoo of `zoo_prune.py`, exported by torch and simplified, and the models of the measuring
kit. In every group half of the units (rounded down) go, drawn at random. Each pruned model is
loaded and run, and compared with the model in which nothing reads the units; units that
normalisations count are left out of that comparison only. 0.25 is ideal where both sides of
every weight shrink.
"""

import argparse
import io
import json
import logging
import statistics
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parent))

from edgewright.model import input_specs, parameter_count
from edgewright.passes.names import assign_names, names_in
from edgewright.prune.cut import cut, masked
from edgewright.prune.labels import analyse
from edgewright.prune.outputs import closed
from edgewright.prune.prepare import prepared
from edgewright.runtime.local import open_local
from edgewright.simplify import finish, simplified

Row = dict[str, Any]
OPSET = 20


def main() -> int:
    """Command line; 1 where a pruned model does not run or differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--kit", type=Path, default=Path("../shared/kit"))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    from zoo_prune import ZOO

    kit = {p.parent.name: p for p in sorted(asked.kit.glob("*/model.onnx"))}
    rows = []
    for name in asked.names or [*ZOO, *kit]:
        model = exported(name) if name in ZOO else onnx.load(kit[name])
        feed = None if name in ZOO else sample(kit[name].parent)
        row = {"name": name, **reach(simple(model), feed)}
        rows.append(row)
        if not asked.json:
            show(row)
    if asked.json:
        print(json.dumps(rows, indent=1))
    else:
        for label, part in (("zoo", ZOO), ("kit", kit)):
            left = [r["kept"] for r in rows if r["name"] in part]
            if left:
                print(f"{label}: median {statistics.median(left):.3f}, largest {max(left):.3f}")
    return int(any(row["error"] > 1e-4 for row in rows))


def exported(name: str) -> onnx.ModelProto:
    """An entry of the zoo as torch exports it."""
    import torch
    from zoo_prune import made

    module, inputs = made(name)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=OPSET, verbose=False, external_data=False
        )
        logging.disable(logging.NOTSET)
    return program.model_proto


def simple(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the stage `simplify` makes of it, and vectors of their own for every layer."""
    work = ir.from_proto(model)
    names = names_in(work)
    assign_names(work, names)
    job: Any = SimpleNamespace(tell=lambda *a: None)
    done = simplified(ir.to_proto(work), names, job, None)
    assert not done.broken, done.broken
    return prepared(finish(done, {p.key: p.value for p in model.metadata_props}))


def sample(case: Path) -> dict[str, np.ndarray]:
    """The first calibration sample of a case of the kit."""
    with np.load(case / "calibration.npz") as data:
        names = {key.split("__")[0]: key for key in sorted(data.files, reverse=True)}
        feed = {n: np.asarray(data[k] if "__" in k else data[k][0]) for n, k in names.items()}
    for spec in input_specs(onnx.load(case / "model.onnx")):
        if len(spec.shape) == feed[spec.name].ndim + 1:
            feed[spec.name] = feed[spec.name][None]
    return feed


def reach(model: onnx.ModelProto, feed: dict[str, np.ndarray] | None) -> Row:
    """Remove half of each group, run, compare."""
    begin = time.process_time()
    analysis = analyse(model)
    seconds = time.process_time() - begin
    rng = np.random.default_rng(0)
    if feed is None:
        feed = {
            s.name: rng.normal(size=[d or 1 for d in s.shape]).astype(s.dtype)
            if s.dtype.kind == "f"
            else rng.integers(0, 100, [d or 1 for d in s.shape])
            for s in input_specs(model)
        }
    remove = {g.name: rng.permutation(g.units)[: len(g.units) // 2] for g in analysis.groups}
    small, _ = cut(model, analysis, [u for units in remove.values() for u in units])
    open_local(small.SerializeToString()).run(feed)
    whole = open_local(model.SerializeToString()).run(feed)
    sure = {g.name for g in analysis.groups if g.exact or g.kind == "head_dim"}
    units = [u for name, part in remove.items() if name in sure for u in part]
    pairs = zip(
        open_local(cut(model, analysis, units)[0].SerializeToString()).run(feed),
        open_local(masked(model, analysis, units).SerializeToString()).run(feed),
        whole,
        strict=True,
    )
    error = max(float(np.abs(a - b).max() / max(np.abs(o).max(), 1e-6)) for a, b, o in pairs)
    return {
        "parameters": parameter_count(model),
        "kept": parameter_count(small) / parameter_count(closed(model)),
        "groups": len(analysis.groups),
        "kinds": sorted({g.kind for g in analysis.groups}),
        "policy": analysis.policy,
        "frozen": sorted({f"{f['op']}: {f['reason']}" for f in analysis.frozen}),
        "error": error,
        "seconds": seconds,
    }


def show(row: Row) -> None:
    """One line."""
    print(
        f"{row['name']:20} {row['parameters']:>9} {row['kept']:6.3f} {row['groups']:4} groups"
        f" {row['error']:8.1e} {row['seconds']:5.2f} s  {', '.join(row['kinds'])}"
        f"  {row['policy']}  {'; '.join(row['frozen'])}"
    )


if __name__ == "__main__":
    sys.exit(main())
