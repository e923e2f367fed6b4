"""LSTM, GRU and RNN, step by step, as the operator texts write them (opsets 7 to 22)."""

from collections.abc import Callable

import torch

from edgewright.recover.ops.node import Node, Op, Result, Tensor, Value, at, need

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "hardsigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "softsign": torch.nn.functional.softsign,
    "softplus": lambda x: torch.nn.functional.softplus(x),
}
DEFAULT = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}


def functions(node: Node, direction: int) -> list[Callable[[Tensor], Tensor]]:
    """The activation functions of one direction."""
    count = len(DEFAULT[node.op])
    given = node.get("activations")
    names = [n.lower() for n in given[direction * count :][:count]] if given else DEFAULT[node.op]
    if node.get("activation_alpha") or node.get("activation_beta"):
        raise node.refuse("activation_alpha or activation_beta")
    if unknown := [n for n in names if n not in ACTIVATIONS]:
        raise node.refuse(f"the activation {unknown[0]}")
    return [ACTIVATIONS[n] for n in names]


def lstm_step(node: Node, direction: int, r: Tensor, bias_r: Tensor, peep: Tensor | None) -> Step:
    """(x W^T + Wb, (H, C)) -> (H, C); gates in the order i o f c."""
    f, g, h = functions(node, direction)
    p_i, p_o, p_f = peep.chunk(3, -1) if peep is not None else (0.0, 0.0, 0.0)

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, cell = state
        i, o, forget, c = clipped(node, x + hidden @ r.T + bias_r).chunk(4, -1)
        i, forget = f(i + p_i * cell), f(forget + p_f * cell)
        if node.get("input_forget", 0):
            forget = 1 - i
        cell = forget * cell + i * g(c)
        return f(o + p_o * cell) * h(cell), cell

    return step


def gru_step(node: Node, direction: int, r: Tensor, bias_r: Tensor, peep: Tensor | None) -> Step:
    """(x W^T + Wb, (H,)) -> (H,); gates in the order z r h."""
    f, g = functions(node, direction)
    size = r.shape[1]

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden,) = state
        x_gates, x_new = x[..., : 2 * size], x[..., 2 * size :]
        gates = x_gates + hidden @ r[: 2 * size].T + bias_r[: 2 * size]
        z, reset = f(clipped(node, gates)).chunk(2, -1)
        if node.get("linear_before_reset", 0):
            new = x_new + reset * (hidden @ r[2 * size :].T + bias_r[2 * size :])
        else:
            new = x_new + (reset * hidden) @ r[2 * size :].T + bias_r[2 * size :]
        return ((1 - z) * g(clipped(node, new)) + z * hidden,)

    return step


def rnn_step(node: Node, direction: int, r: Tensor, bias_r: Tensor, peep: Tensor | None) -> Step:
    (f,) = functions(node, direction)
    return lambda x, state: (f(clipped(node, x + state[0] @ r.T + bias_r)),)


def clipped(node: Node, x: Tensor) -> Tensor:
    edge = node.get("clip")
    return torch.clamp(x, -edge, edge) if edge else x


STEPS = {"LSTM": lstm_step, "GRU": gru_step, "RNN": rnn_step}


def scan(
    step: Step, x: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x (T, N, gates) -> all hidden states (T, N, H) and the last states; short rows stop."""
    times = range(x.shape[0])
    hidden: list[Tensor] = [x.new_empty(0)] * x.shape[0]
    for t in reversed(times) if backwards else times:
        new = step(x[t], state)
        if lengths is None:
            state, hidden[t] = new, new[0]
            continue
        alive = (t < lengths)[:, None]
        state = tuple(torch.where(alive, a, b) for a, b in zip(new, state, strict=True))
        hidden[t] = torch.where(alive, new[0], torch.zeros_like(new[0]))
    return torch.stack(hidden), state


def recurrent(node: Node, inputs: list[Value]) -> Result:
    x, w, r, b = need(inputs, 0), need(inputs, 1), need(inputs, 2), at(inputs, 3)
    lengths, peep = at(inputs, 4), at(inputs, 7)
    batch_first = bool(node.get("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    steps, batch = x.shape[:2]
    size, rows = r.shape[-1], r.shape[1]
    if lengths is not None and bool((lengths == steps).all()):
        lengths = None
    count = 2 if node.op == "LSTM" else 1
    initial = []
    for k in range(count):
        value = at(inputs, 5 + k)
        if value is None:
            value = x.new_zeros(w.shape[0], batch, size)
        elif batch_first:
            value = value.transpose(0, 1)
        initial.append(value)
    outputs, last = [], []
    backwards = [node.get("direction", "forward") == "reverse"]
    backwards = backwards if w.shape[0] == 1 else [False, True]
    for d, turned in enumerate(backwards):
        bias = b[d] if b is not None else x.new_zeros(2 * rows)
        step = STEPS[node.op](node, d, r[d], bias[rows:], None if peep is None else peep[d])
        projected = x @ w[d].T + bias[:rows]
        y, state = scan(step, projected, tuple(v[d] for v in initial), lengths, turned)
        outputs.append(y)
        last.append(state)
    y = torch.stack(outputs, 1)  # (T, D, N, H)
    ends = [torch.stack([state[k] for state in last]) for k in range(count)]  # (D, N, H)
    if batch_first:
        y = y.permute(2, 0, 1, 3)
        ends = [e.transpose(0, 1) for e in ends]
    return (y, *ends)[: len(node.outputs)]


OPS: dict[str, Op] = {"LSTM": recurrent, "GRU": recurrent, "RNN": recurrent}
