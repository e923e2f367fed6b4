"""GELU written out in the order of factors that runtimes fuse into one kernel.

x * (h * (1 + erf(...))) becomes (x * (1 + erf(...))) * h, for one number h. ONNX Runtime (1.31)
looks for the factor behind the product or on x, torch's exporter writes it in between. For
h = 1/2 nothing is rounded in either order, so the values stay the same to the bit (but for
those below 2^-126).
"""

import onnx_ir as ir

from edgewright.passes.edit import insert_before, lone_user, matching, producer, replace, scalar

HALF = 0.5


def order_gelus(model: ir.Model) -> int:
    """Returns the number of GELUs written in the other order."""
    count = 0
    for node in matching(model, "Mul"):
        for x, product in (node.inputs, node.inputs[::-1]):
            inner = producer(product, "Mul")
            if inner is None or product is None or lone_user(product, node.graph) is not node:
                continue
            halves = [v for v in inner.inputs if scalar(v) == HALF]
            sums = [v for v in inner.inputs if is_one_plus_erf(v)]
            if len(halves) != 1 or len(sums) != 1:
                continue
            value = insert_before(node, "Mul", [x, sums[0]], like=node.outputs[0])
            replace(node, "Mul", [value, halves[0]])
            count += 1
            break
    return count


def is_one_plus_erf(value: ir.Value | None) -> bool:
    """Whether the value is 1 + erf(...), in either order."""
    node = producer(value, "Add")
    if node is None:
        return False
    erfs = [v for v in node.inputs if producer(v, "Erf")]
    return len(erfs) == 1 and any(scalar(v) == 1 for v in node.inputs)
