"""The model cut into units that are priced, and optimised graphs brought back to them.

A unit is an int8 layer with all that follows it up to the next one: an activation that float
convolutions have for nothing is nodes of its own behind an int8 one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from edgewright.model import initializers
from edgewright.quantize.placement import CORE, Placement

# What the runtime and the QDQ writer add to the names they are given.
FUSED = re.compile(
    r"(_token_\d+|_nchwc|_nhwc|/\w*Fusion/?|_QuantizeLinear|_DequantizeLinear|_Output|_Input"
    r"|_pre_q|_post_dq\d*|_q_to_dq|_dq\d*|_q|_out\d+|_arg)+$"
)


@dataclass(frozen=True)
class Timed:
    """A node of an optimised graph: microseconds of a run, elements that it writes."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    us: float
    elements: int


@dataclass(frozen=True)
class Units:
    """The model cut into units: node -> unit; unit 0 is what comes before the first int8 layer."""

    of: dict[str, int]
    cores: tuple[str, ...]


def units_of(model: onnx.ModelProto, placement: Placement) -> Units:
    """Each node in the unit of the latest int8 layer that it depends on."""
    chosen = set(placement.nodes)
    made: dict[str, int] = {}
    of: dict[str, int] = {}
    cores = [""]
    for node in model.graph.node:
        unit = max((made.get(i, 0) for i in node.input), default=0)
        if node.op_type in CORE and node.name in chosen:
            unit = len(cores)
            cores.append(node.name)
        of[node.name] = unit
        made |= dict.fromkeys(node.output, unit)
    return Units(of, tuple(cores))


def plain(name: str) -> str:
    """A name of the optimised graph without what the runtime and the writer added to it."""
    return FUSED.sub("", name.removeprefix("fused "))


def assign(timed: Sequence[Timed], model: onnx.ModelProto, units: Units) -> list[int]:
    """The unit of each node of an optimised graph, in its topological order.

    By its name, by the tensor it is called after (layout transformers do that), by what it
    writes, else the unit of what it reads. A QuantizeLinear belongs to what reads it: it is only
    there for an int8 layer.
    """
    makers = {o: n.name for n in model.graph.node for o in n.output}

    def known(name: str) -> int | None:
        for text in (name, plain(name)):
            if text in units.of:
                return units.of[text]
            if text in makers:
                return units.of[makers[text]]
        return None

    found: list[int] = []
    made: dict[str, int] = {}
    for node in timed:
        names = [node.name, *node.outputs]
        unit = next((u for u in map(known, names) if u is not None), None)
        if unit is None:
            unit = max((made.get(i, 0) for i in node.inputs), default=0)
        found.append(unit)
        made |= dict.fromkeys(node.outputs, unit)
    readers: dict[str, list[int]] = {}
    for k, node in enumerate(timed):
        for name in node.inputs:
            readers.setdefault(name, []).append(k)
    for k in range(len(timed) - 1, -1, -1):
        after = [found[r] for o in timed[k].outputs for r in readers.get(o, [])]
        if timed[k].op == "QuantizeLinear" and after:
            found[k] = min(after)
    return found


def crossings(
    model: onnx.ModelProto, placement: Placement, units: Units, sizes: Mapping[str, int]
) -> dict[tuple[int, int], int]:
    """Elements of the int8 tensors from one unit to another: (maker, reader) -> elements."""
    chosen, stored = set(placement.nodes), initializers(model.graph)
    makers = {o: n for n in model.graph.node for o in n.output if o}
    seen: set[tuple[int, str]] = set()
    found: dict[tuple[int, int], int] = {}
    for node in model.graph.node:
        for name in node.input:
            maker = makers.get(name)
            if name in stored or maker is None or not {maker.name, node.name} <= chosen:
                continue
            a, b = units.of[maker.name], units.of[node.name]
            if a != b and (b, name) not in seen:
                seen.add((b, name))
                found[a, b] = found.get((a, b), 0) + sizes.get(name, 0)
    return found
