"""What an emulated target tells of cost and kernels: instructions of candidate and original.

Counts are exact (see `runtime.counting`), so one inference each decides, where times would need
thousands of pairs. What the target's profile promises of its kernels is held against them: a CPU
with dot-product instructions must execute some where a model has int8 layers.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx

from edgewright import model as graph
from edgewright.data import Feed
from edgewright.errors import EdgewrightError
from edgewright.measure.kernels import int8_nodes
from edgewright.measure.race import CANDIDATE, ORIGINAL
from edgewright.runtime import counting, emulator
from edgewright.target import Target

INT8 = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
EXACT_RUNS = 3  # with one and the same number make a count exact
WHAT = (
    "instructions of one inference, one thread, the number most of the last runs have; the first "
    "runs are dropped"
)


def instructions(
    candidate: Path, original: Path, feed: Feed, target: Target
) -> tuple[dict[str, Any] | None, str | None]:
    """The `instructions` part of the measurement, and why there is none where there is none.

    Both models are counted at the same time: what another process does changes no count.
    """
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            side: pool.submit(counting.count, path, feed, target)
            for side, path in ((CANDIDATE, candidate), (ORIGINAL, original))
        }
    try:
        found = {side: job.result() for side, job in jobs.items()}
    except EdgewrightError as error:
        return None, str(error)
    new, old = found[CANDIDATE].total, found[ORIGINAL].total
    return {
        **{side: describe(counts) for side, counts in found.items()},
        "ratio": new / old,
        "kernels": kernels(candidate, found[CANDIDATE], target),
        "statistic": WHAT,
        "emulator": f"QEMU {emulator.qemu_version(target.device.arch)}, {target.run.cpu_model}",
    }, None


def describe(counts: counting.Counts) -> dict[str, Any]:
    """One model's counts; `exact`: enough runs have one and the same number."""
    return {
        "total": counts.total,
        "runs": list(counts.runs),
        "exact": counts.equal >= EXACT_RUNS,
        "classes": counts.classes,
    }


def kernels(candidate: Path, counts: counting.Counts, target: Target) -> dict[str, Any] | None:
    """What the profile promises of int8 kernels, and what was executed; None off ARM.

    promised: the class of instructions int8 layers must use, None where the CPU has none for
    them. layers: int8 layers of the model that would use them. executed: by class.
    """
    if target.device.arch != "aarch64":
        return None
    return {
        "promised": promised(target),
        "layers": int8_layers(graph.load(candidate)),
        "executed": {name: counts.classes.get(name, 0) for name in ("dot", "i8mm", "mlal")},
    }


def promised(target: Target) -> str | None:
    """The class of instructions that int8 layers get on the CPU of a profile.

    USMMLA takes uint8 by int8; int8 by int8 goes to SDOT where a CPU has both (facts: ONNX
    Runtime 1.31 on a CPU with i8mm).
    """
    isa = target.device.isa
    if "i8mm" in isa and target.int8.activations == "uint8":
        return "i8mm"
    return "dot" if "asimddp" in isa else None


def int8_layers(model: onnx.ModelProto) -> int:
    """Layers whose products are of int8 values and not of single channels, in the file.

    Depthwise convolutions are left out: their kernels may use widening multiplications instead.
    """
    layers = [n for n in int8_nodes(model) if n.op_type in ("Conv", "MatMul", "Gemm")]
    layers += [n for part in graph.all_graphs(model.graph) for n in part.node if n.op_type in INT8]
    return sum(all(a.name != "group" or a.i == 1 for a in node.attribute) for node in layers)
