"""The placement contract: which provider and which kernel every node got, and how much work it is.

Two witnesses. ONNX Runtime's own assignment says which nodes of the graph went to which provider,
also those that a compiling provider made one node of. Its profile says which kernels ran, and for
how long. Work is time where the times are those of the device: on the cores of the process, and
not emulated. Elsewhere a profile times only the call, and work is multiply-accumulates.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgewright import model as graph
from edgewright.data import Feed
from edgewright.measure.kernels import CONTAINERS, int8_nodes, kernel_macs, kind, stored_sizes
from edgewright.measure.race import CANDIDATE, ask, blame, open_side
from edgewright.runtime.launch import session_options
from edgewright.runtime.providers import COMPILING, on_host_cpu
from edgewright.runtime.session import Launch
from edgewright.target import Target
from edgewright.work import WORK, macs_by_name

NO_FALLBACK = "session.disable_cpu_ep_fallback"
FUSED = "/MatMulAddFusion"  # what the runtime adds to the name of a MatMul that it made a Gemm
SLOWEST = 10
LEAST_RUNS, PROFILE_S = 5, 0.5  # after these seconds of profiling, the least runs are enough
Node = dict[str, Any]
Groups = list[dict[str, Any]]  # worker.assigned


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


def provider_share(
    nodes: list[Node], groups: Groups | None, target: Target, in_file: int, timed: bool
) -> tuple[float, str]:
    """Share of the work that runs on the target's provider, and what the work is counted in.

    nodes: as executed, with `time` and `macs`. groups: the assignment, with `macs`. in_file:
    number of nodes in the model file. 0 where the provider took nothing.
    """
    provider = target.runtime.provider
    ours = [n for n in nodes if n["provider"] == provider]
    strays = [n for n in nodes if n["provider"] != provider]
    if not ours:
        return 0.0, "work"
    if not strays:
        return 1.0, "work"
    if timed and on_host_cpu(target):
        return sum(n["time"] for n in ours) / sum(n["time"] for n in nodes), "time"
    if provider in COMPILING and groups is not None:
        macs = [(g["provider"] == provider, g["macs"]) for g in groups]
    else:
        macs = [(n["provider"] == provider, n["macs"]) for n in nodes]
    total = 0 if any(m is None for _, m in macs) else sum(m for _, m in macs)
    if total:
        return sum(m for own, m in macs if own) / total, "multiply-accumulates"
    if provider in COMPILING:  # all nodes that are not executed elsewhere are inside a compiled one
        return 1 - len(strays) / max(in_file, len(strays)), "nodes"
    return len(ours) / len(nodes), "nodes"


def int8_work(nodes: list[Node], groups: Groups | None) -> dict[str, Any]:
    """The multiply-accumulates of a run, and the share of them in int8 or why it is not known.

    Inside compiled nodes: of the layers that stand in the model in int8 form.
    """
    unknown = {"macs": None, "int8_work_share": None}
    known: list[tuple[Any, Any]]
    if not any(n["kind"] == "compiled" for n in nodes):
        known = [(n["macs"] if n["kind"] == "int8" else 0, n["macs"]) for n in nodes]
    elif groups is None:
        return {**unknown, "int8_work_reason": "this onnxruntime does not tell its assignment"}
    else:
        known = [(g["int8_macs"], g["macs"]) for g in groups]
    if any(macs is None for _, macs in known):
        return {**unknown, "int8_work_reason": "the sizes or names of some layers are not known"}
    total = sum(macs for _, macs in known)
    if not total:
        return {**unknown, "int8_work_reason": "the model multiplies nothing"}
    share = sum(macs for macs, _ in known) / total
    return {"macs": total, "int8_work_share": share, "int8_work_reason": ""}


def summarise(
    nodes: list[Node],
    target: Target,
    in_file: int,
    timed: bool = True,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """The placement report of `node_times`; `timed`: whether the times are those of the device."""
    runtime = target.runtime
    for node in nodes:
        compiled = node["provider"] in COMPILING
        node["kind"] = kind(node["op"], node["types"], known=not compiled)
        node["time"] = 0.0 if node["op"] in CONTAINERS else node["us"]
    total = sum(node["time"] for node in nodes)
    timed = timed and total > 0

    def share(chosen: Iterable[Node]) -> float | None:
        return sum(n["time"] for n in chosen) / total if timed else None

    def count(key: str) -> dict[str, int]:
        values = [node[key] for node in nodes]
        return {v: values.count(v) for v in sorted(set(values))}

    rows: dict[tuple[str, str, str], list[Node]] = {}
    for node in nodes:
        rows.setdefault((node["op"], node["kind"], node["provider"]), []).append(node)
    operators: list[dict[str, Any]] = [
        {"op": op, "kind": k, "provider": p, "count": len(row), "share": share(row)}
        for (op, k, p), row in rows.items()
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
    reached, unit = provider_share(nodes, groups, target, in_file, timed)
    strays = [n for n in nodes if n["provider"] != runtime.provider]
    strict = runtime.session.get(NO_FALLBACK) == "1"
    return {
        "provider": runtime.provider,
        "provider_share": reached,
        "share_of": unit,
        "required_share": 1.0 if strict else runtime.min_provider_share,
        "ok": bool(nodes) and reached >= runtime.min_provider_share and not (strict and strays),
        "strays": [
            {"name": n["name"], "op": n["op"], "provider": n["provider"]}
            for n in sorted(strays, key=lambda n: -n["time"])
        ],
        **int8_work(nodes, groups),
        "required_int8_share": runtime.min_int8_share,
        "assigned": assigned_counts(groups),
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


def assigned_counts(groups: Groups | None) -> dict[str, dict[str, int]] | None:
    """Provider -> how many nodes of the graph it was given, in how many groups."""
    if groups is None:
        return None
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        row = found.setdefault(group["provider"], {"nodes": 0, "groups": 0})
        row["nodes"] += len(group["nodes"])
        row["groups"] += 1
    return dict(sorted(found.items()))


def with_macs(groups: Groups | None, macs: Mapping[str, int], int8: set[str]) -> Groups | None:
    """The assignment with the multiply-accumulates of each group, all and in int8 form.

    None for both where a layer's work is not known: nodes without names cannot be told apart.
    """
    if groups is None:
        return None
    found = []
    for group in groups:
        names = [n["name"].removesuffix(FUSED) for n in group["nodes"] if n["op"] in WORK]
        known = all(name in macs for name in names)
        every = sum(macs.get(name, 0) for name in names)
        some = sum(macs.get(name, 0) for name in names if name in int8)
        numbers = {"macs": every, "int8_macs": some}
        found.append({**group, **(numbers if known else dict.fromkeys(numbers))})
    return found


def profile_nodes(
    model: Path,
    target: Target,
    launch: Launch,
    feeds: list[Feed],
    runs: int,
    timed: bool = True,
) -> dict[str, Any]:
    """Profile at most `runs` runs of the candidate on the target and say where every node went.

    A session that forbids the CPU is profiled without that, so that the nodes can be named.
    """
    options = session_options(target)["session"]
    options.pop(NO_FALLBACK, None)
    with tempfile.TemporaryDirectory(prefix="edgewright-profile-") as folder:
        more: dict[str, Any] = {"profile": str(Path(folder) / "profile"), "session": options}
        written = Path(folder) / "optimized.onnx"
        if target.runtime.provider not in COMPILING:  # compiled nodes cannot be written
            more["optimized"] = str(written)
        with open_side(CANDIDATE, model, target, launch, **more) as session:
            with blame(CANDIDATE):
                session.keep_feeds(feeds)
            request = {"op": "profile", "runs": runs, "least": LEAST_RUNS, "seconds": PROFILE_S}
            answer = ask(CANDIDATE, session, request)
            version = session.info["version"]
        sizes = stored_sizes(graph.load(written)) if written.exists() else {}
    nodes = node_times(answer["nodes"], answer["runs"])
    for node in nodes:
        node["macs"] = kernel_macs(node, sizes.get(node["name"], []))
    groups = answer["assigned"]
    file = graph.load(model)
    if target.runtime.provider in COMPILING:
        shapes = {name: array.shape for name, array in feeds[0].items()}
        groups = with_macs(groups, macs_by_name(file, shapes), {n.name for n in int8_nodes(file)})
    report = summarise(nodes, target, graph.count_nodes(file), timed, groups)
    return {**report, "runs": answer["runs"], "onnxruntime": version}
