"""Does pruning by a criterion, and distilling with a loss, beat chance and doing nothing?

    python bench/distil_digits.py [--seeds 3] [--steps 300] [--macs 0.3] [--models cnn,lstm]

Three small nets on scikit-learn's digits (8x8, first half trains, second half tests): a CNN, an
LSTM over the rows, attention over the rows. Each is trained here on labels, loses units until a
share of its multiply-accumulates is left, and is then compensated and distilled on unlabelled
pictures. Prints Markdown: mean test accuracy over the seeds, for every criterion (with and without
what follows), and for every loss on the units that `hessian` chose. Seeds change the trained net,
the units of `random`, and the order of the training samples. Finished runs are kept in --runs.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper, parser
from sklearn.datasets import load_digits

from edgewright.model import name_nodes
from edgewright.prune.costs import Costs
from edgewright.prune.criteria import GRADIENT, scores
from edgewright.prune.cut import cut
from edgewright.prune.labels import Analysis, analyse
from edgewright.prune.select import select
from edgewright.recipe import Distillation
from edgewright.recover import gradients
from edgewright.recover.compensate import compensate
from edgewright.recover.distill import distill
from edgewright.recover.executor import to_module
from edgewright.runtime.local import open_local
from edgewright.stage import say_nothing

SPLIT = 898
HEAD = '<ir_version: 8, opset_import: ["" : 18]> g (float[N,8,8] x) => (float[N,10] y) {'
C3 = "kernel_shape=[3,3], pads=[1,1,1,1]"


def block(k: int, read: str, wide: int) -> str:
    """One transformer block of four heads over eight tokens, reading `read`, making `out{k}`."""
    part = wide // 4
    heads = f"<value_ints=[0, 8, 4, {part}]>"
    return f"""
    n{k} = LayerNormalization <axis=-1> ({read}, g{k}, h{k})
    q{k} = MatMul (n{k}, wq{k}) k{k} = MatMul (n{k}, wk{k}) v{k} = MatMul (n{k}, wv{k})
    s{k} = Constant {heads} ()
    qs{k} = Reshape (q{k}, s{k}) ks{k} = Reshape (k{k}, s{k}) vs{k} = Reshape (v{k}, s{k})
    qt{k} = Transpose <perm=[0,2,1,3]> (qs{k}) kt{k} = Transpose <perm=[0,2,3,1]> (ks{k})
    vt{k} = Transpose <perm=[0,2,1,3]> (vs{k}) l{k} = MatMul (qt{k}, kt{k})
    m{k} = Mul (l{k}, scale) p{k} = Softmax <axis=-1> (m{k}) o{k} = MatMul (p{k}, vt{k})
    ot{k} = Transpose <perm=[0,2,1,3]> (o{k}) f{k} = Constant <value_ints=[0, 8, {wide}]> ()
    oc{k} = Reshape (ot{k}, f{k}) a{k} = MatMul (oc{k}, wo{k}) r{k} = Add ({read}, a{k})
    i{k} = LayerNormalization <axis=-1> (r{k}, i_g{k}, i_h{k}) u{k} = MatMul (i{k}, wu{k})
    ub{k} = Add (u{k}, bu{k}) e{k} = Relu (ub{k}) d{k} = MatMul (e{k}, wd{k})
    db{k} = Add (d{k}, bd{k}) out{k} = Add (r{k}, db{k})
    """


def block_shapes(k: int, wide: int) -> dict[str, tuple[int, ...]]:
    square = {f"w{n}{k}": (wide, wide) for n in "qkvo"}
    norms = {f"{n}{k}": (wide,) for n in ("g", "h", "i_g", "i_h")}
    inner = {f"wu{k}": (wide, 2 * wide), f"bu{k}": (2 * wide,)}
    return square | norms | inner | {f"wd{k}": (2 * wide, wide), f"bd{k}": (wide,)}


NETS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "cnn": (
        f"""{HEAD} t = Unsqueeze (x, one) a = Conv <{C3}> (t, wa, ba) ra = Relu (a)
        b = Conv <{C3}, strides=[2,2]> (ra, wb, bb) rb = Relu (b)
        c = Conv <{C3}> (rb, wc, bc) rc = Relu (c) d = Conv <{C3}> (rc, wd, bd)
        s = Add (rb, d) rd = Relu (s) e = Conv <{C3}, strides=[2,2]> (rd, we, be) re = Relu (e)
        m = GlobalAveragePool (re) f = Flatten (m) y = Gemm <transB=1> (f, wh, bh) }}""",
        {"wa": (16, 1, 3, 3), "ba": (16,), "wb": (32, 16, 3, 3), "bb": (32,),
         "wc": (32, 32, 3, 3), "bc": (32,), "wd": (32, 32, 3, 3), "bd": (32,),
         "we": (64, 32, 3, 3), "be": (64,), "wh": (10, 64), "bh": (10,)},
    ),
    "lstm": (
        f"""{HEAD} t = Transpose <perm=[1,0,2]> (x) a = LSTM <hidden_size=48> (t, w0, r0, b0)
        s = Squeeze (a, one) b, h = LSTM <hidden_size=48> (s, w1, r1, b1)
        z = Squeeze (b, one) m = ReduceMean <keepdims=0> (z, zero)
        y = Gemm <transB=1> (m, wh, bh) }}""",
        {"w0": (1, 192, 8), "r0": (1, 192, 48), "b0": (1, 384), "w1": (1, 192, 48),
         "r1": (1, 192, 48), "b1": (1, 384), "wh": (10, 48), "bh": (10,)},
    ),
    "attention": (
        f"""{HEAD} e = MatMul (x, we) t = Add (e, place) {block(0, "t", 48)}
        {block(1, "out0", 48)} n = LayerNormalization <axis=-1> (out1, gl, hl)
        m = ReduceMean <keepdims=0> (n, one) y = Gemm <transB=1> (m, wh, bh) }}""",
        {"we": (8, 48), "place": (1, 8, 48), **block_shapes(0, 48), **block_shapes(1, 48),
         "gl": (48,), "hl": (48,), "wh": (10, 48), "bh": (10,)},
    ),
}  # fmt: skip


def build(name: str, seed: int) -> onnx.ModelProto:
    """The net with random weights: variance 1 / inputs, biases 0, scales of norms 1."""
    text, shapes = NETS[name]
    model = parser.parse_model(text)
    rng = np.random.default_rng(seed)
    values = {"one": np.array([1]), "zero": np.array([0]), "scale": np.float32(12**-0.5)}
    for key, shape in shapes.items():
        if key.startswith(("g", "i_g")):
            value = np.ones(shape)
        elif len(shape) == 1 or key.startswith("b"):
            value = np.zeros(shape)
        else:
            inputs = shape[0] if name == "attention" and key != "wh" else np.prod(shape[1:])
            inputs = shape[-1] if name == "lstm" else inputs
            value = rng.normal(0, float(inputs) ** -0.5, shape)
        values[key] = value.astype(np.float32)
    read = {n for node in model.graph.node for n in node.input}
    for key, value in values.items():
        if key in read:
            model.graph.initializer.append(numpy_helper.from_array(value, key))
    name_nodes(model)
    return onnx.shape_inference.infer_shapes(model)


def pictures() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


X, Y = pictures()


def feeds() -> Iterator[dict[str, np.ndarray]]:
    """Every second training picture, without its label."""
    return ({"x": X[k : k + 1]} for k in range(0, SPLIT, 2))


def trained(name: str, seed: int, epochs: int = 15) -> onnx.ModelProto:
    """The net, trained on the labels of the first half; pictures move by up to a pixel."""
    model = build(name, seed)
    module = to_module(model)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3, weight_decay=1e-2)
    steps = epochs * (SPLIT // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    images, labels = torch.from_numpy(X[:SPLIT]), torch.from_numpy(Y[:SPLIT])
    for _ in range(epochs):
        for rows in torch.randperm(SPLIT, generator=random)[: SPLIT // 32 * 32].view(-1, 32):
            by = torch.randint(-1, 2, (2,), generator=random).tolist()
            (logits,) = module({"x": torch.roll(images[rows], by, (1, 2))})
            loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.write_back(model)
    return model


def accuracy(model: onnx.ModelProto) -> float:
    """Per cent of the test half."""
    (y,) = open_local(model.SerializeToString()).run({"x": X[SPLIT:]})
    return 100 * float((y.argmax(1) == Y[SPLIT:]).mean())


def chosen(
    model: onnx.ModelProto, analysis: Analysis, criterion: str, share: float, seed: int
) -> frozenset[int]:
    if criterion in GRADIENT:
        found = gradients.scores(model, analysis, criterion, feeds, say_nothing, seed=seed)  # type: ignore[arg-type]
    else:
        found = scores(model, analysis, criterion, feeds, say_nothing, seed)
    costs = Costs(model, analysis, "macs", {"x": (1, 8, 8)})
    # The same share everywhere: only the choice of units differs between criteria.
    return frozenset(select(analysis, found, costs, share, allocation="uniform").remove)


CRITERIA = ("random", "l1", "l2", "activation", "hessian", "taylor", "fisher")


def losses(base: Distillation) -> dict[str, Distillation]:
    return {
        "soft labels": replace(base, outputs="soft", feature=0.0),
        "squared error": replace(base, outputs="value", feature=0.0),
        "both": replace(base, feature=0.0),
        "feature only": replace(base, soft=0.0, feature=1.0),
        "both + feature (default)": base,
        "both + feature + attention": replace(base, attention=0.5),
        "default + hard 0.3": replace(base, hard=0.3),
        "default without mixtures": replace(base, mix=False),
    }


def one_seed(name: str, seed: int, share: float, base: Distillation) -> dict[str, float]:
    """Accuracy of every arm for one trained net."""
    model = trained(name, seed)
    analysis = analyse(model)
    found = {"original": accuracy(model)}

    def student(criterion: str, repaired: bool) -> tuple[onnx.ModelProto, dict]:
        small, kept = cut(model, analysis, chosen(model, analysis, criterion, share, seed))
        if repaired:
            compensate(model, small, kept, feeds, say_nothing)
        return small, kept

    for criterion in CRITERIA:
        found[f"{criterion}: cut"] = accuracy(student(criterion, False)[0])
        small, kept = student(criterion, True)
        found[f"{criterion}: compensated"] = accuracy(small)
        distill(model, small, feeds, base, kept=kept)
        found[f"{criterion}: distilled"] = accuracy(small)
    start, kept = student("hessian", True)
    for words, settings in losses(base).items():
        small = copy.deepcopy(start)
        if settings == base:
            found[words] = found["hessian: distilled"]
            continue
        labels = Y[:SPLIT:2] if settings.hard else None
        distill(model, small, feeds, settings, kept=kept, labels=labels)
        found[words] = accuracy(small)
    return found


def table(title: str, rows: list[str], columns: list[str], cell: Callable[[str, str], str]) -> str:
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|-" * (len(columns) + 1) + "|"]
    lines += [f"| {r} | " + " | ".join(cell(r, c) for c in columns) + " |" for r in rows]
    return "\n".join(lines)


def finished(path: Path) -> list[dict]:
    """The runs that are done already; delete the file to do them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--steps", type=int, default=300)
    words.add_argument("--macs", type=float, default=0.3)
    words.add_argument("--models", default=",".join(NETS))
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--runs", type=Path, default=Path("build/distil_digits.jsonl"))
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    base = Distillation(steps=given.steps, threads=given.threads)
    for name in given.models.split(","):
        runs = []
        for seed in range(given.seeds):
            key = {"net": name, "seed": seed, "steps": given.steps, "macs": given.macs}
            done = [r for r in finished(given.runs) if r["key"] == key]
            if not done:
                begin = time.monotonic()
                found = one_seed(name, seed, given.macs, replace(base, seed=seed))
                done = [{"key": key, "found": found, "seconds": time.monotonic() - begin}]
                with given.runs.open("a") as file:
                    file.write(json.dumps(done[0]) + "\n")
            runs.append(done[0]["found"])

        def cell(row: str, column: str, runs: list[dict[str, float]] = runs) -> str:
            key = f"{row}: {column}" if column != "distilled, accuracy" else row
            values = [run[key] for run in runs]
            return f"{np.mean(values):.2f} ({min(values):.1f} to {max(values):.1f})"

        first = np.mean([run["original"] for run in runs])
        print(f"\n{name}: original {first:.2f} %, {given.macs:.0%} of the MACs left\n")
        print(table("criterion", list(CRITERIA), ["cut", "compensated", "distilled"], cell))
        print()
        print(table("loss", list(losses(base)), ["distilled, accuracy"], cell), flush=True)


if __name__ == "__main__":
    main()
