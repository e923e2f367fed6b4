"""How long each node of a model's optimised graph takes on this machine."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.model import load
from edgewright.quantize.units import Timed
from edgewright.runtime.launch import launch_for, session_options
from edgewright.runtime.session import Session
from edgewright.target import Target

RUNS = 40  # per profile; fewer where a run is slow, see SECONDS
LEAST_RUNS = 8
SECONDS = 2.0


def profile(path: Path, target: Target, folder: Path, feeds: list[Feed]) -> list[Timed]:
    """Profile a model in a process of its own: the nodes of the graph it really ran, in order."""
    optimized = folder / "optimized.onnx"
    with Session(
        path,
        launch=launch_for(target),
        profile=str(folder / "profile"),
        optimized=str(optimized),
        **session_options(target),
    ) as session:
        session.keep_feeds(feeds)
        warm = session.ask({"op": "slice", "seconds": 0.2, "min_runs": 3})[0]["cpu_s"]
        runs = int(np.clip(SECONDS / max(min(warm), 1e-6), LEAST_RUNS, RUNS))
        events = session.ask({"op": "profile", "runs": runs})[0]["nodes"]
    graph = load(optimized).graph
    optimized.unlink()
    return joined(graph, events)


def joined(graph: onnx.GraphProto, events: list[dict[str, Any]]) -> list[Timed]:
    """The nodes of an optimised graph with their times; nodes that never ran have time 0.

    Events carry a node's name. Nodes without one (bodies of inlined functions) are told apart
    by their order, per operator. A node's time is the mean over the faster half of its runs:
    single times are whole microseconds, and what disturbs a run makes it slower.
    """
    times: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        times[event["name"]].append(event)
    named = {n.name for n in graph.node}
    strays: dict[str, list[str]] = defaultdict(list)
    for name, group in times.items():
        if name not in named:
            strays[group[0]["op"]].append(name)
    found = []
    for node in graph.node:
        name = node.name or next(iter(strays[node.op_type][:1]), "")
        if not node.name:
            del strays[node.op_type][:1]
        group = times.get(name, [])
        durations = np.sort([e["us"] for e in group])[: (len(group) + 1) // 2]
        found.append(
            Timed(
                node.name,
                node.op_type,
                tuple(i for i in node.input if i),
                tuple(o for o in node.output if o),
                float(durations.mean()) if group else 0.0,
                max((e["elements"] for e in group), default=0),
            )
        )
    return found
