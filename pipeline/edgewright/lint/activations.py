"""Activations that neither vanish into a layer's range nor have an int8 kernel that pays."""

from collections.abc import Iterator

import onnx_ir as ir

from edgewright.lint.finding import Hit
from edgewright.lint.operators import BORDERS, PLACED, between_layers, is_float, key
from edgewright.passes.clips import bounds_of
from edgewright.passes.edit import all_nodes, attribute, is_op, matching, producer

SMOOTH = "stays float; a model trained with ReLU or ReLU6 has it inside the layer's range"
GELU = "stays float, which is right for it: the products around it are int8"
SLOWER = "its int8 form is slower than the float one: float, with a conversion on each side"
ACTIVATIONS = {
    "HardSwish": (BORDERS, SMOOTH),
    "HardSigmoid": (BORDERS, SMOOTH),
    "SiLU": (SLOWER, SMOOTH),
    "Gelu": (BORDERS, GELU),
    "PRelu": (BORDERS, SMOOTH),
    "LeakyRelu": ("the placement has no int8 form for it: float between int8 layers", SMOOTH),
    "Elu": (BORDERS, SMOOTH),
    "Selu": (BORDERS, SMOOTH),
    "Celu": (BORDERS, SMOOTH),
    "Mish": (BORDERS, SMOOTH),
    "Softplus": (BORDERS, SMOOTH),
    "Softsign": (BORDERS, SMOOTH),
    "Tanh": (BORDERS, SMOOTH),
}


def activations(model: ir.Model) -> Iterator[Hit]:
    """Activations that neither vanish into a range nor have a kernel that pays."""
    inner = between_layers(model)
    for node in all_nodes(model):
        name = activation_of(node) if node in inner else ""
        if name:
            yield Hit("activation", name, key(node), "info", *ACTIVATIONS[name], PLACED)


def activation_of(node: ir.Node) -> str:
    """The activation a node is, or ends where it is written out; "" for none."""
    if node.op_type in ACTIVATIONS and node.domain in ("", "ai.onnx"):
        return node.op_type
    if is_op(node, "Erf") and any(is_op(u.node, "Add") for u in node.outputs[0].uses()):
        return "Gelu"
    if is_op(node, "Mul") and len(node.inputs) == 2:
        for one, other in (node.inputs, node.inputs[::-1]):
            gate = producer(one, "Sigmoid")
            if gate is not None and gate.inputs[0] is other:
                return "SiLU"
            gate = producer(one, "HardSigmoid")
            if gate is not None and gate.inputs[0] is other:
                return "HardSwish"
    return ""


def clips(model: ir.Model) -> Iterator[Hit]:
    """Clip that does not vanish into the range of the layer before it."""
    inner = between_layers(model)
    for node in matching(model, "Clip"):
        if node not in inner or not is_float(node.outputs[0]):
            continue
        bounds = bounds_of(node)
        form = ""
        if bounds is None:
            form = "with computed bounds"
        else:
            low, high = attribute(node, "min", bounds[0]), attribute(node, "max", bounds[1])
            if not low <= 0 <= high:
                form = "whose bounds do not hold zero"
        if form:
            yield Hit(
                "activation",
                f"Clip {form}",
                key(node),
                "info",
                "an int8 range holds zero always, so the Clip stays a float node",
                "bounds around zero, stored, vanish into the range",
                PLACED,
            )
