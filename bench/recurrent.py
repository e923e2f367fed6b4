#!/usr/bin/env python3
"""Whether any int8 form of a recurrent layer beats the float operator of ONNX Runtime.

    python bench/recurrent.py [--rounds N]

For LSTM and GRU of several widths: the dynamic int8 LSTM that the quantize stage writes, and
cells written out, with the input's product for all steps as one int8 product, as a Scan and
unrolled. Prints CPU time as a share of the float operator's, and the SQNR in dB.
"""

import argparse
import re
import statistics
import time

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from edgewright.quantize.lstm import write_dynamic_lstm
from edgewright.target import load_target

SIZES = ((32, 64, 64), (32, 128, 256), (32, 256, 512), (16, 512, 1024))  # steps, inputs, hidden
WORK = 2e8  # multiply-accumulates of one timed slice
GATES = {"LSTM": 4, "GRU": 3}
RANGE = 4.0  # inputs are cut there, so a fixed scale is known
PROJECTION = """xq = QuantizeLinear(x, xs, middle)
    gx3 = com.microsoft.MatMulIntegerToFloat(xq, wq, xs, ws, middle, wz, wb)
    all = Squeeze(gx3, axis)"""
STATE = {
    "static": """hq = QuantizeLinear(h, hs, middle)
        gh = com.microsoft.MatMulIntegerToFloat(hq, rq, hs, rs, middle, rz, rb)""",
    "dynamic": "gh = com.microsoft.DynamicQuantizeMatMul(h, rq, rs, rz, rb)",
}
CELL = {
    "GRU": """zx, rx, nx = Split<axis=1>(gx, gates)  zh, rh, nh = Split<axis=1>(gh, gates)
        za = Add(zx, zh)  z = Sigmoid(za)  ra = Add(rx, rh)  rr = Sigmoid(ra)  rn = Mul(rr, nh)
        na = Add(nx, rn)  n = Tanh(na)  d = Sub(h, n)  zd = Mul(z, d)  hn = Add(n, zd)""",
    "LSTM": """ga = Add(gx, gh)  i, o, f, g = Split<axis=1>(ga, gates)  ii = Sigmoid(i)
        oo = Sigmoid(o)  ff = Sigmoid(f)  gg = Tanh(g)  fc = Mul(ff, c)  ig = Mul(ii, gg)
        cn = Add(fc, ig)  tc = Tanh(cn)  hn = Mul(oo, tc)""",
}
Models = dict[str, onnx.ModelProto]


def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    head = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(head + text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight (out, in) as int8 columns (in, out), and their scales."""
    scale = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    return np.ascontiguousarray(np.rint(weight / scale[:, None]).astype(np.int8).T), scale


def models(op: str, steps: int, inputs: int, hidden: int) -> Models:
    """The float operator and all int8 forms, with the same random weights."""
    rng, gates = np.random.default_rng(1), GATES[op]

    def weight(*shape: int) -> np.ndarray:
        return (rng.uniform(-1, 1, shape) / np.sqrt(hidden)).astype(np.float32)

    w, r, b = (weight(1, gates * hidden, n) for n in (inputs, hidden, 2))
    bias = np.ascontiguousarray(b.transpose(0, 2, 1)).reshape(1, -1)
    after = ", linear_before_reset=1" if op == "GRU" else ""
    plain = parse(
        f"""g (float[{steps},1,{inputs}] x) => (float[{steps},1,1,{hidden}] y) {{
            y = {op}<hidden_size={hidden}{after}>(x, w, r, b)
        }}""",
        w=w,
        r=r,
        b=bias,
    )
    found = {"float": plain}
    if op == "LSTM":
        found["operator"] = write_dynamic_lstm(plain, load_target("cpu").int8, ["y"])
    (wq, ws), (rq, rs) = columns(w[0]), columns(r[0])
    zeros = np.zeros(gates * hidden, np.int8)
    stored = {"wq": wq, "ws": ws, "wz": zeros, "rq": rq, "rs": rs, "rz": zeros}
    stored |= {"wb": bias[0, : gates * hidden], "rb": bias[0, gates * hidden :]}
    stored |= {"xs": np.float32(2 * RANGE / 255), "hs": np.float32(2 / 255)}
    stored |= {"middle": np.uint8(128), "axis": np.int64([1]), "first": np.int64([0])}
    stored |= {"gates": np.int64([hidden] * gates), "h0": np.zeros((1, hidden), np.float32)}
    for how, product in STATE.items():
        for form, write in (("scan", scanned), ("unrolled", unrolled)):
            body = write(op, product, steps, hidden)
            text = f"g (float[{steps},1,{inputs}] x) => (float[{steps},1,{hidden}] y) {{ {body} }}"
            ones = {"ones": np.ones(steps, np.int64)} if form == "unrolled" else {}
            found[f"{form} {how}"] = parse(text, **stored, **ones)
    return found


def scanned(op: str, product: str, steps: int, hidden: int) -> str:
    """The cell as the body of a Scan."""
    state = ["h", "c"] if op == "LSTM" else ["h"]
    row = f"float[1,{hidden}]"
    takes = ", ".join([*(f"{row} {s}" for s in state), f"float[{GATES[op] * hidden}] step"])
    gives = ", ".join([*(f"{row} {s}n" for s in state), f"{row} seen"])
    body = f"b ({takes}) => ({gives}) {{ gx = Unsqueeze(step, first) {product} {CELL[op]} "
    body += "seen = Identity(hn) }"
    last, begin = ", ".join(f"{s}l" for s in state), ", ".join("h0" for _ in state)
    return f"{PROJECTION} {last}, y = Scan<num_scan_inputs=1, body = {body}>({begin}, all)"


def unrolled(op: str, product: str, steps: int, hidden: int) -> str:
    """The cell once for each step."""
    made = set(re.findall(r"(\w+)(?=(?:, \w+)* = )", f"{product} {CELL[op]}"))
    names = [f"gx_{t}" for t in range(steps)]
    text = f"{PROJECTION} {', '.join(names)} = Split<axis=0>(all, ones) "
    for t in range(steps):
        swap = {name: f"{name}_{t}" for name in [*made, "gx"]}
        swap |= {s: f"{s}n_{t - 1}" if t else "h0" for s in ("h", "c")}
        text += re.sub(r"\w+", lambda m, s=swap: s.get(m[0], m[0]), f"{product} {CELL[op]} ")
    rows = ", ".join(f"hn_{t}" for t in range(steps))
    return f"{text} rows = Concat<axis=0>({rows}) y = Unsqueeze(rows, axis)"


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def compare(op: str, sizes: tuple[int, int, int], rounds: int) -> str:
    """One line: every form's share of the float time, and its SQNR."""
    steps, inputs, hidden = sizes
    sessions = {name: session(m) for name, m in models(op, *sizes).items()}
    x = np.random.default_rng(2).normal(size=(steps, 1, inputs)).astype(np.float32)
    feed = {"x": np.clip(x, -RANGE, RANGE)}
    values = {n: s.run(None, feed)[0].reshape(-1).astype(float) for n, s in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    count = max(1, int(WORK / (steps * (inputs + hidden) * hidden * GATES[op])))
    for _ in range(rounds):
        for name, one in sessions.items():
            begin = time.process_time()
            for _ in range(count):
                one.run(None, feed)
            times[name].append((time.process_time() - begin) / count)
    parts = []
    for name in list(sessions)[1:]:
        pairs = zip(times[name], times["float"], strict=True)
        noise = np.square(values[name] - values["float"]).sum()
        db = 10 * np.log10(np.square(values["float"]).sum() / noise)
        parts.append(f"{name} {statistics.median(a / b for a, b in pairs):.2f} ({db:.0f} dB)")
    base = statistics.median(times["float"]) * 1e3
    return f"{op} {steps} x {inputs} -> {hidden}: {base:.3f} ms; {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    for op in GATES:
        for sizes in SIZES:
            print(compare(op, sizes, asked.rounds), flush=True)


if __name__ == "__main__":
    main()
