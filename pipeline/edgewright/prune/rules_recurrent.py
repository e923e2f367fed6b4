"""LSTM, GRU and RNN: one hidden unit is a row in every gate, a column of the recurrence, a state.

W (D, gates*H, I), R (D, gates*H, H), B (D, 2*gates*H), P (D, 3*H); D directions share the
hidden axis of Y. In the order of ONNX the rows of gate k are k*H to (k+1)*H.
"""

import numpy as np
import onnx

from edgewright.prune.axes import Axes, Mix, integer, operand

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(ax: Axes, node: onnx.NodeProto) -> None:
    gates = GATES[node.op_type]
    x, w, r = node.input[:3]
    stored = [operand(node, k) for k in (1, 2, 3)]
    stored += [operand(node, 7)] if node.op_type == "LSTM" else []
    if any(name and name not in ax.stored for name in stored):
        return ax.refuse(node, "the weights are computed")
    ws, rs = ax.axes(w), ax.axes(r)
    size = integer(node, "hidden_size", len(rs[2]))
    if ax.stored[r].dims[2] != size or ax.stored[w].dims[1] != gates * size:
        return ax.refuse(node, "weights do not fit hidden_size")
    hidden = rs[2]
    ax.freeze(ws[0], rs[0])
    for ids in (ws[1], rs[1]):
        tie_rows(ax, ids, hidden)
    for name in stored[2:]:
        if name:
            ax.freeze(ax.axes(name)[0])
            tie_rows(ax, ax.axes(name)[1], hidden)
    xs = ax.axes(x)
    ax.freeze(*xs[:2])
    ax.same(xs[2], ws[2])
    if operand(node, 4):
        ax.freeze_all(operand(node, 4))
    states = [operand(node, 5), operand(node, 6) if node.op_type == "LSTM" else ""]
    for name in (*states, *node.output):
        if name:
            *rest, last = ax.axes(name)
            ax.freeze(*rest)
            ax.same(last, hidden)
    ax.mark("hidden", hidden)
    ax.mix(node, 0, 2, w, 2)
    # The recurrence reads the node's own output: its columns are a consumer's weights as well.
    label = node.name or node.output[0]
    ax.mixes.append(Mix(label, node.op_type, node.output[0], 3, r, 2))
    return None


def tie_rows(ax: Axes, rows: np.ndarray, hidden: np.ndarray) -> None:
    """Rows [k*H + h] with hidden unit h, for every k."""
    if len(hidden) < 2:
        ax.freeze(rows)
    else:
        ax.tie(rows.reshape(-1, len(hidden)), hidden[None])
