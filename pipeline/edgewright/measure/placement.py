"""Which kernel every node got: providers, int8 or float, and the share of time, from a profile."""

import tempfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from edgewright import model as graph
from edgewright.data import Feed
from edgewright.measure.race import CANDIDATE, ask, blame, open_side
from edgewright.runtime.session import Launch
from edgewright.target import Target

INT8_KERNELS = (
    "QLinear*",
    "*Integer*",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QGemm",
    "QAttention",
    "QEmbedLayerNormalization",
    "QOrdered*",
)
BORDERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
CONTAINERS = ("If", "Loop", "Scan")  # their time is that of the nodes inside, listed apart
FLOATS = ("float", "float16", "bfloat16", "double")
# These replace many nodes by one of their own, so counting what is left would count it unfairly.
COMPILING = (
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "OpenVINOExecutionProvider",
    "QNNExecutionProvider",
    "CoreMLExecutionProvider",
    "NnapiExecutionProvider",
)
SLOWEST = 10


def kind(op: str, types: Iterable[str], known: bool = True) -> str:
    """How a kernel computes: int8, border, float, other (indices, shapes, control flow), compiled.

    Operators such as Transpose or MaxPool have one name for all types, so the types of the
    inputs decide; scales make most int8 kernels have float inputs too, so int8 comes first.
    """
    if not known:
        return "compiled"
    if op in BORDERS:
        return "border"
    if any(fnmatchcase(op, pattern) for pattern in INT8_KERNELS):
        return "int8"
    types = set(types)
    if op in CONTAINERS:
        return "other"
    if op != "Cast" and types & {"int8", "uint8"}:
        return "int8"
    return "float" if types & set(FLOATS) else "other"


def node_times(events: list[dict[str, Any]], runs: int) -> list[dict[str, Any]]:
    """One entry per executed node: microseconds of a run, a mean over runs without the first.

    The quarter of the fastest and of the slowest runs is left out; a median would be a whole
    number of microseconds, too coarse for small nodes.

    Nodes of a loop body or of a branch taken in some runs only have no whole number of events
    per run; for them it is the mean.
    """
    nodes: dict[tuple[str, int, str], dict[str, Any]] = {}
    for event in events:
        key = (event["name"], event["index"], event["op"])
        nodes.setdefault(key, {**event, "us": []})["us"].append(event["us"])
    for node in nodes.values():
        times = np.asarray(node["us"], dtype=float)
        if times.size % runs:
            node["us"] = float(times.sum() / runs)
        else:
            each = times.reshape(runs, -1).sum(axis=1)
            each = np.sort(each[1:] if runs > 1 else each)
            cut = each.size // 4
            node["us"] = float(each[cut : each.size - cut].mean())
    return list(nodes.values())


def provider_share(nodes: list[dict[str, Any]], provider: str, in_file: int) -> float:
    """Share of the nodes that run on the provider.

    Of the executed nodes; where the provider compiles subgraphs into one node, of the nodes in
    the file, all those not executed elsewhere being inside a compiled one.
    """
    strays = sum(node["provider"] != provider for node in nodes)
    if provider in COMPILING:
        return 1 - strays / max(in_file, strays, 1) if len(nodes) > strays else 0.0
    return 1 - strays / len(nodes) if nodes else 0.0


def summarise(
    nodes: list[dict[str, Any]], target: Target, in_file: int, timed: bool = True
) -> dict[str, Any]:
    """The placement report of `node_times`; `timed`: whether the times are those of the device."""
    provider, required = target.runtime.provider, target.runtime.min_provider_share
    for node in nodes:
        compiled = node["provider"] in COMPILING
        node["kind"] = kind(node["op"], node["types"], known=not compiled)
        node["time"] = 0.0 if node["op"] in CONTAINERS else node["us"]
    total = sum(node["time"] for node in nodes)
    timed = timed and total > 0

    def share(chosen: Iterable[dict[str, Any]]) -> float | None:
        return sum(n["time"] for n in chosen) / total if timed else None

    def count(key: str) -> dict[str, int]:
        values = [node[key] for node in nodes]
        return {v: values.count(v) for v in sorted(set(values))}

    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for node in nodes:
        groups.setdefault((node["op"], node["kind"], node["provider"]), []).append(node)
    operators: list[dict[str, Any]] = [
        {"op": op, "kind": k, "provider": p, "count": len(group), "share": share(group)}
        for (op, k, p), group in groups.items()
    ]
    operators.sort(key=lambda o: (-(o["share"] or 0.0), -o["count"], o["op"]))
    opaque = any(node["kind"] == "compiled" for node in nodes)
    shares = {
        f"{k}_share": None if opaque else share(n for n in nodes if n["kind"] == k)
        for k in ("int8", "border", "float", "other")
    }
    reason = "the provider compiles nodes and does not tell their types" if opaque else None
    if not timed:
        reason = "emulated time is not latency"
    reached = provider_share(nodes, provider, in_file)
    return {
        "provider": provider,
        "provider_share": reached,
        "required_share": required,
        "ok": bool(nodes) and reached >= required,
        "strays": [
            {"name": n["name"], "op": n["op"], "provider": n["provider"]}
            for n in nodes
            if n["provider"] != provider
        ],
        "nodes": count("provider"),
        "nodes_by_kind": count("kind"),
        "operators": operators,
        **shares,
        "share_reason": reason,
        "float_nodes": [
            {"name": n["name"], "op": n["op"], "share": share([n])}
            for n in sorted(nodes, key=lambda n: -n["time"])
            if n["kind"] == "float"
        ],
        "slowest": [
            {"name": n["name"], "op": n["op"], "kind": n["kind"], "share": share([n])}
            for n in sorted(nodes, key=lambda n: -n["time"])[:SLOWEST]
        ]
        if timed
        else [],
    }


def profile_nodes(
    model: Path,
    target: Target,
    launch: Launch,
    feeds: list[Feed],
    runs: int,
    timed: bool = True,
) -> dict[str, Any]:
    """Profile `runs` runs of the candidate on the target and say where every node went."""
    with tempfile.TemporaryDirectory(prefix="edgewright-profile-") as folder:
        prefix = str(Path(folder) / "profile")
        with open_side(CANDIDATE, model, target, launch, profile=prefix) as session:
            with blame(CANDIDATE):
                session.keep_feeds(feeds)
            answer = ask(CANDIDATE, session, {"op": "profile", "runs": runs})
            version = session.info["version"]
    in_file = graph.count_nodes(graph.load(model))
    nodes = node_times(answer["nodes"], runs)
    return {**summarise(nodes, target, in_file, timed), "runs": runs, "onnxruntime": version}
