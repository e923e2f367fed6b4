"""Branches that no valid run takes.

Scripted exporters write `if x.size(1) == 1: x = x.squeeze(1)` as an If whose branches have
different ranks, although what reads the result takes one rank only: a recurrent operator 3, a
convolution that of its weights. Where exactly one branch has the rank that is needed, every run
that takes the other stops with an error; so the condition is known, and constant folding puts
the branch in the place of the If. What was an error stays one: the branch that is left fails on
such an input as well, or the reader does.
"""

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import constant, integers, is_op, matching, operand, rank, stored

RECURRENT = ("LSTM", "GRU", "RNN")
CONVOLUTION = ("Conv", "ConvTranspose")
SAME_RANK = ("Relu", "Sigmoid", "Tanh", "Cast", "Identity", "Clip", "Softmax")


def decide_branches(model: ir.Model) -> int:
    """Give such If nodes a stored condition; returns how many."""
    count = 0
    for node in matching(model, "If"):
        if constant(node.inputs[0]) is not None:
            continue
        then_branch = node.attributes["then_branch"].as_graph()
        else_branch = node.attributes["else_branch"].as_graph()
        choice = None
        for k, output in enumerate(node.outputs):
            needed = needed_rank(output)
            ranks = rank(then_branch.outputs[k]), rank(else_branch.outputs[k])
            if needed is None or None in ranks:
                continue
            fitting = [r == needed for r in ranks]
            if sum(fitting) == 1:
                choice = fitting[0]
        if choice is not None:
            condition = stored(model, np.array(choice), f"{node.name}_condition")
            node.replace_input_with(0, condition)
            count += 1
    return count


def needed_rank(value: ir.Value) -> int | None:
    """The rank that a reader of the value asks for; None where no reader tells."""
    for use in value.uses():
        if use.node.graph is not value.graph:
            continue  # a nested graph may never run
        found = rank_for(use.node, use.idx)
        if found is not None:
            return found
    return None


def rank_for(node: ir.Node, index: int) -> int | None:
    """The rank this node needs of its input `index`."""
    if index != 0:
        return None
    if is_op(node, *RECURRENT):
        return 3
    if is_op(node, *CONVOLUTION):
        return rank(node.inputs[1])
    if is_op(node, *SAME_RANK):
        return needed_rank(node.outputs[0])
    axes = integers(operand(node, 1))
    if is_op(node, "Unsqueeze", "Squeeze") and axes is not None:
        behind = needed_rank(node.outputs[0])
        step = -len(axes) if is_op(node, "Unsqueeze") else len(axes)
        return None if behind is None else behind + step
    return None
