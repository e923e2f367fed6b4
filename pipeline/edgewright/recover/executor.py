"""ONNX graphs run, and differentiated, in torch; trained values go back into the same tensors.

A converter would rename and reorder; here the graph stays what it is and torch only computes
with its stored tensors, so that training is a change of values and nothing else. (Of the
converters, onnx2torch fails on what torch's exporter writes today and loses MatMul weights,
onnx2fx 0.0.1 lacks recurrent layers and makes every scalar trainable.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from edgewright.errors import BadInput
from edgewright.model import opset, reads, real_inputs, subgraphs
from edgewright.recover.ops import OPS, Node, Tensor, Value
from edgewright.settings import suggestion

# Inputs that hold what training may change; other stored tensors (shapes, limits, epsilons,
# running statistics) stay as they are.
TRAINED: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "Add": (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
    "PRelu": (1,),
    "Gather": (0,),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}
MASK = 1e4  # a stored tensor with values beyond is a mask or a limit, not a weight


@dataclass(frozen=True)
class Plan:
    """A graph ready to run: its nodes in order, its own constants, the graphs inside nodes."""

    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    outputs: tuple[str, ...]
    branches: dict[int, dict[str, "Plan"]]  # by index of the node, by attribute


def stored_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Stored tensors of the main graph by name: initializers and the values of Constant nodes."""
    found = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        for a in node.attribute:
            if node.op_type == "Constant" and a.name == "value":
                found[node.output[0]] = a.t
    return found


def as_tensor(values: np.ndarray, name: str) -> Tensor:
    """The array's memory as a tensor; BadInput for types that torch cannot hold."""
    try:
        return torch.from_numpy(values)
    except TypeError:
        raise BadInput(
            f"the tensor '{name}' cannot be used in torch",
            expected="an ordinary number type",
            found=str(values.dtype),
        ) from None


def to_tensor(proto: onnx.TensorProto) -> Tensor:
    return as_tensor(np.array(numpy_helper.to_array(proto)), proto.name)  # a copy to write to


def read_node(proto: onnx.NodeProto, version: int) -> Node:
    attributes: dict[str, Any] = {}
    for a in proto.attribute:
        if a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            continue
        value = onnx.helper.get_attribute_value(a)
        if a.type == onnx.AttributeProto.TENSOR:
            value = to_tensor(value)
        elif a.type == onnx.AttributeProto.STRING:
            value = value.decode()
        elif a.type == onnx.AttributeProto.STRINGS:
            value = [v.decode() for v in value]
        attributes[a.name] = value
    name = proto.name or proto.output[0]
    return Node(name, proto.op_type, tuple(proto.input), tuple(proto.output), attributes, version)


def make_plan(graph: onnx.GraphProto, version: int) -> Plan:
    """The graph as a plan; nested graphs of `If` are plans of their own."""
    nodes = tuple(read_node(n, version) for n in graph.node)
    branches = {
        k: {a.name: make_plan(a.g, version) for a in proto.attribute if a.HasField("g")}
        for k, proto in enumerate(graph.node)
        if proto.op_type == "If"
    }
    constants = {t.name: to_tensor(t) for t in graph.initializer}
    return Plan(nodes, constants, tuple(o.name for o in graph.output), branches)


def unknown_nodes(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Operators that cannot be run here, with the names of their nodes."""
    found: dict[str, list[str]] = {}
    for node in graph.node:
        known = node.op_type in OPS or node.op_type == "If"
        if node.domain not in ("", "ai.onnx") or not known:
            domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}:"
            found.setdefault(domain + node.op_type, []).append(node.name or node.output[0])
        for inner in subgraphs(node):
            for op, names in unknown_nodes(inner).items():
                found.setdefault(op, []).extend(names)
    return found


def trainable(model: onnx.ModelProto) -> list[str]:
    """Names of the stored float32 tensors that training may change, in graph order.

    More than one element, finite, read by nothing but the places of TRAINED.
    """
    stored = stored_tensors(model)
    places: dict[str, list[bool]] = {}
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name in stored:
                places.setdefault(name, []).append(k in TRAINED.get(node.op_type, ()))
        for inner in subgraphs(node):
            for deep in inner.node:
                for name in reads(deep):
                    places.setdefault(name, []).append(False)
    for value in model.graph.output:
        places.setdefault(value.name, []).append(False)
    found = []
    for name, good in places.items():
        if name not in stored or not all(good):
            continue
        tensor = stored[name]
        if tensor.data_type != onnx.TensorProto.FLOAT or int(np.prod(tensor.dims)) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        if np.isfinite(values).all() and np.abs(values).max() < MASK:
            found.append(name)
    return found


class GraphModule(torch.nn.Module):
    """A model as a torch module: `module(feeds)` gives its outputs.

    weights: the trained tensors by the name of their initializer (also what `parameters()`
    yields, in the same order). rounding: tensors of the main graph that every reader gets through
    a function, for quantization-aware training.
    """

    def __init__(self, model: onnx.ModelProto, train: Sequence[str]) -> None:
        super().__init__()
        self.plan = make_plan(model.graph, opset(model))
        self.inputs = tuple(v.name for v in real_inputs(model))
        self.outputs = self.plan.outputs
        stored = stored_tensors(model)
        self.weights: dict[str, torch.nn.Parameter] = {}
        for k, name in enumerate(train):
            self.weights[name] = torch.nn.Parameter(to_tensor(stored[name]))
            self.register_parameter(f"p{k}", self.weights[name])  # names there may hold no dot
        self.rounding: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self.last: dict[str, int] = {}
        for k, proto in enumerate(model.graph.node):
            self.last.update(dict.fromkeys(reads(proto), k))

    def forward(
        self, feeds: Mapping[str, Tensor | np.ndarray], wanted: Sequence[str] | None = None
    ) -> list[Tensor]:
        """The outputs in the model's order, or the tensors `wanted` names in that order."""
        scope: dict[str, Value] = {"": None}
        for name in self.inputs:
            if name not in feeds:
                raise BadInput(f"model input '{name}' is missing in a feed")
            value = feeds[name]
            tensor = as_tensor(value, name) if isinstance(value, np.ndarray) else value
            scope[name] = self.rounding.get(name, same)(tensor)
        names = self.outputs if wanted is None else tuple(wanted)
        run_plan(self.plan, scope, self.weights, self.last, set(names), self.rounding)
        if missing := [n for n in names if n not in scope]:
            raise BadInput(f"the model has no tensor '{missing[0]}'")
        return [self.value(scope[n]) for n in names]

    def value(self, value: Value) -> Tensor:
        assert value is not None
        return value

    def write_back(self, model: onnx.ModelProto) -> None:
        """Copy the trained values into the stored tensors of the same names, in place.

        Raises BadInput where the model lacks one of them or has it in another shape.
        """
        stored = stored_tensors(model)
        for name, weight in self.weights.items():
            proto = stored.get(name)
            if proto is None or tuple(proto.dims) != tuple(weight.shape):
                raise BadInput(
                    f"the trained tensor '{name}' does not fit the model",
                    expected=f"a stored tensor of shape {list(weight.shape)}",
                    found="none" if proto is None else str(list(proto.dims)),
                )
            values = weight.detach().numpy()
            proto.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), proto.name))


def same(value: Tensor) -> Tensor:
    return value


def run_plan(
    plan: Plan,
    scope: dict[str, Value],
    weights: Mapping[str, Tensor],
    last: Mapping[str, int] | None,
    wanted: set[str],
    rounding: Mapping[str, Callable[[Tensor], Tensor]] = {},
) -> None:
    """Run the nodes; what they make joins `scope`, and leaves it when nothing reads it later."""
    for name, value in plan.constants.items():
        scope[name] = rounding.get(name, same)(weights.get(name, value))
    for k, node in enumerate(plan.nodes):
        if node.op == "If":
            results = run_branch(plan.branches[k], node, scope)
        elif node.op == "Constant" and node.outputs[0] in weights:
            results = (weights[node.outputs[0]],)
        else:
            results = run_node(node, [scope[n] for n in node.inputs])
        for name, result in zip(node.outputs, results, strict=False):
            if name:
                scope[name] = rounding.get(name, same)(result)
        if last is None:
            continue
        for name in (*node.inputs, *node.outputs):
            if name and last.get(name, -1) <= k and name not in wanted:
                scope.pop(name, None)


def run_node(node: Node, inputs: list[Value]) -> tuple[Tensor, ...]:
    try:
        result = OPS[node.op](node, inputs)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        shapes = [None if v is None else list(v.shape) for v in inputs]
        raise BadInput(
            f"node '{node.name}' ({node.op}) failed in torch on inputs of shapes {shapes}",
            found=" ".join(str(error).split())[:300],
        ) from None
    return result if isinstance(result, tuple) else (result,)


def run_branch(
    branches: Mapping[str, Plan], node: Node, scope: dict[str, Value]
) -> tuple[Tensor, ...]:
    """The branch that the condition takes; it sees everything around it."""
    condition = scope[node.inputs[0]]
    assert condition is not None
    taken = branches["then_branch" if bool(condition) else "else_branch"]
    inner = dict(scope)
    run_plan(taken, inner, {}, None, set())
    found = [inner[n] for n in taken.outputs]
    return tuple(v for v in found if v is not None)


def to_module(model: onnx.ModelProto, train: Sequence[str] | None = None) -> GraphModule:
    """The model as a differentiable torch module.

    train: names of the stored tensors to make parameters (None: all of `trainable`). Raises
    BadInput for operators that are not covered, naming them and their nodes.
    """
    if unknown := unknown_nodes(model.graph):
        ops = "; ".join(f"{op} ({', '.join(names[:3])})" for op, names in sorted(unknown.items()))
        raise BadInput(
            "the model has operators that cannot be trained in torch",
            found=ops,
            hint="recover with least squares instead, which needs no gradients",
        )
    able = trainable(model)
    for name in train or ():
        if name not in stored_tensors(model):
            raise BadInput(f"the model stores no tensor '{name}'", hint=suggestion(name, able))
    return GraphModule(model, able if train is None else train)
