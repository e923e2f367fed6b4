"""Does pruning by a criterion, and distilling with a loss, beat chance and doing nothing?

    python bench/distil_digits.py [--seeds 0,1,2] [--more 3,4,5] [--steps N] [--models cnn,lstm]

Three small nets on scikit-learn's digits (8x8, first half trains, second half tests): a CNN, an
LSTM over the rows, attention over the rows. Each is trained here on labels, loses units until a
share of its multiply-accumulates is left, is compensated and distilled on the training pictures
(their labels are read by one of the losses), and becomes int8. Prints Markdown: test accuracy, mean
and standard deviation over the seeds, for every criterion and for every loss on the units that
`hessian` chose. Criteria are compared on more seeds, each with the mean of several draws of
`random` on the same net. Seeds change the trained net, the units of `random`, and the order of the
training samples. Every finished cell is a line of --runs, and is not computed again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from onnx import numpy_helper, parser
from sklearn.datasets import load_digits

from edgewright import quantize
from edgewright.data import Feed
from edgewright.model import name_nodes
from edgewright.prune.costs import Costs
from edgewright.prune.criteria import GRADIENT, scores
from edgewright.prune.cut import Kept, cut
from edgewright.prune.labels import Analysis, analyse
from edgewright.prune.select import select
from edgewright.recipe import Distillation, RecoverSettings, parse_recipe
from edgewright.recover import fitting, gradients
from edgewright.recover.compensate import compensate
from edgewright.recover.distill import distill
from edgewright.recover.executor import to_module
from edgewright.runtime.local import open_local
from edgewright.stage import Job, say_nothing
from edgewright.target import load_target

SPLIT = 898
LONG = 1000
RATES = {"lstm": 2e-2}  # of the original's training, where 0.003 ends too soon
HEAD = '<ir_version: 8, opset_import: ["" : 18]> g (float[N,8,8] x) => (float[N,10] y) {'
C3 = "kernel_shape=[3,3], pads=[1,1,1,1]"


def block(k: int, read: str) -> str:
    """One transformer block of four heads over eight tokens, reading `read`, making `out{k}`."""
    return f"""
    n{k} = LayerNormalization <axis=-1> ({read}, g{k}, h{k})
    q{k} = MatMul (n{k}, wq{k}) k{k} = MatMul (n{k}, wk{k}) v{k} = MatMul (n{k}, wv{k})
    qs{k} = Reshape (q{k}, s{k}) ks{k} = Reshape (k{k}, s{k}) vs{k} = Reshape (v{k}, s{k})
    qt{k} = Transpose <perm=[0,2,1,3]> (qs{k}) kt{k} = Transpose <perm=[0,2,3,1]> (ks{k})
    vt{k} = Transpose <perm=[0,2,1,3]> (vs{k}) l{k} = MatMul (qt{k}, kt{k})
    m{k} = Mul (l{k}, scale) p{k} = Softmax <axis=-1> (m{k}) o{k} = MatMul (p{k}, vt{k})
    ot{k} = Transpose <perm=[0,2,1,3]> (o{k})
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
        f"""{HEAD} e = MatMul (x, we) t = Add (e, place) {block(0, "t")}
        {block(1, "out0")} n = LayerNormalization <axis=-1> (out1, gl, hl)
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
    # Shapes are stored, as `simplify` leaves them: heads behind a computed shape are frozen.
    values |= {f"s{k}": np.array([0, 8, 4, 12]) for k in (0, 1)}
    values |= {f"f{k}": np.array([0, 8, 48]) for k in (0, 1)}
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


def feeds() -> Iterator[Feed]:
    """Every training picture, without its label."""
    return ({"x": X[k : k + 1]} for k in range(SPLIT))


@cache
def trained(name: str, seed: int, epochs: int = 80) -> onnx.ModelProto:
    """The net, trained on the labels of the first half; pictures move by up to a pixel."""
    model = build(name, seed)
    module = to_module(model)
    random = torch.Generator().manual_seed(seed)
    rate = RATES.get(name, 3e-3)
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=1e-2)
    steps = epochs * (SPLIT // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
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


def int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as the stage `quantize` makes it for `cpu`: rules decide, no clock, no metric."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        onnx.save(model, folder / "float.onnx")
        np.savez(folder / "calibration.npz", x=X[:SPLIT:8])
        raw = {
            "model": {"name": "digits", "version": "1", "source": "float.onnx"},
            "data": {"calibration": "calibration.npz"},
            "quantize": {"measure": False},
        }
        (folder / "out").mkdir()
        work = Job(recipe=parse_recipe(raw, folder), target=load_target("cpu"),
                   folder=folder / "out", model=folder / "float.onnx")  # fmt: skip
        quantize.run(work)
        return onnx.load(work.output_model())


@cache
def analysed(name: str, seed: int) -> Analysis:
    return analyse(trained(name, seed))


@cache
def chosen(name: str, seed: int, criterion: str, share: float) -> frozenset[int]:
    model, analysis = trained(name, seed), analysed(name, seed)
    criterion, _, draw = criterion.partition(" ")
    if criterion in GRADIENT:
        found = gradients.scores(
            model, analysis, criterion, feeds, say_nothing, seed=seed, threads=1  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        found = scores(model, analysis, criterion, feeds, say_nothing, seed + 1000 * int(draw or 0))
    costs = Costs(model, analysis, "macs", {"x": (1, 8, 8)})
    # The same share everywhere: only the choice of units differs between criteria.
    return frozenset(select(analysis, found, costs, share, allocation="uniform").remove)


@cache
def repaired(name: str, seed: int, criterion: str, share: float) -> tuple[onnx.ModelProto, Kept]:
    """The net after the cut and compensation; do not change it."""
    model, units = trained(name, seed), chosen(name, seed, criterion, share)
    small, kept = cut(model, analysed(name, seed), units)
    settings = RecoverSettings(method="distill")
    compensate(model, small, kept, lambda: fitting(settings, feeds()), say_nothing)
    return small, kept


RANDOM = ("random", "random 1", "random 2", "random 3")  # draws
CRITERIA = ("l1", "l2", "activation", "hessian", "taylor", "fisher")
DEFAULT = "both + feature (default)"
Found = dict[str, float]
Cells = Iterator[tuple[str, Callable[[], Found]]]


def losses(base: Distillation) -> dict[str, Distillation]:
    return {
        "soft labels": replace(base, outputs="soft", feature=0.0),
        "squared error": replace(base, outputs="value", feature=0.0),
        "both": replace(base, feature=0.0),
        "feature only": replace(base, soft=0.0, feature=1.0),
        DEFAULT: base,
        "both + feature + attention": replace(base, attention=0.5),
        "default + true labels, 0.3": replace(base, hard=0.3),
        "default without mixtures": replace(base, mix=False),
    }


def without_training(name: str, seed: int, criterion: str, share: float) -> Found:
    """Accuracy of the cut, and of the compensated one: what distillation has to beat."""
    model = trained(name, seed)
    if criterion == "none":
        return {"float": accuracy(model), "int8": accuracy(int8(model))}
    units = chosen(name, seed, criterion, share)
    small = repaired(name, seed, criterion, share)[0]
    return {
        "cut": accuracy(cut(model, analysed(name, seed), units)[0]),
        "compensated": accuracy(small),
    }


def distilled(
    name: str, seed: int, criterion: str, share: float, settings: Distillation, then_int8: bool
) -> Found:
    start, kept = repaired(name, seed, criterion, share)
    small = copy.deepcopy(start)
    labels = Y[:SPLIT] if settings.hard else None
    told = distill(trained(name, seed), small, feeds, settings, kept=kept, labels=labels)
    found = {
        "distilled": accuracy(small),
        "rate": told["rate"],
        "distance": told["best"]["distance"],
        "start": told["start"]["distance"],
    }
    return found | ({"int8": accuracy(int8(small))} if then_int8 else {})


def cells(seed: int, share: float, base: Distillation, name: str, more: bool) -> Cells:
    """Name of each cell of one trained net, and the function that fills it; what matters first.

    more: the criteria alone, the cheap cells first.
    """
    long = replace(base, steps=LONG)
    if not more:
        yield "original", partial(without_training, name, seed, "none", share)
        yield f"{LONG} steps", partial(distilled, name, seed, "hessian", share, long, True)
        hard = replace(long, hard=0.3)
        end = partial(distilled, name, seed, "hessian", share, hard, True)
        yield f"{LONG} steps, true labels", end
    for criterion in (*RANDOM, *CRITERIA):
        yield f"{criterion}: start", partial(without_training, name, seed, criterion, share)
    for criterion in (*RANDOM, *CRITERIA):
        also = criterion == "hessian" and not more
        yield criterion, partial(distilled, name, seed, criterion, share, base, also)
    for words, settings in losses(base).items():
        if words != DEFAULT and not more:  # that one is the cell `hessian`
            yield words, partial(distilled, name, seed, "hessian", share, settings, False)


def spread(runs: list[Found], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    digits = 4 if key == "distance" else 2
    if len(values) < 2:
        return " ".join(f"{v:.{digits}f}" for v in values)
    return f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"


def gap(runs: list[Found], against: list[Found], key: str, other: str) -> str:
    """Mean difference over the seeds, and the least one."""
    both = zip(runs, against, strict=False)
    values = [a[key] - b[other] for a, b in both if key in a and other in b]
    if len(values) < 2:
        return " ".join(f"{v:+.2f}" for v in values)
    return f"{np.mean(values):+.2f} (least {min(values):+.2f})"


def above_random(runs: list[dict[str, Found]], criterion: str, end: str, key: str) -> np.ndarray:
    """Rows (own, own minus the mean draw of `random` on the same net), one for each seed that has
    both."""
    pairs = []
    for run in runs:
        drawn = [run[r + end][key] for r in RANDOM if r + end in run]
        chance = float(np.mean(drawn)) if drawn else None
        own = chance if criterion == "random" else run.get(criterion + end, {}).get(key)
        if own is not None and chance is not None:
            pairs.append((own, own - chance))
    return np.array(pairs).reshape(-1, 2)


def over_random(runs: list[list[dict[str, Found]]], criterion: str, end: str, key: str) -> str:
    """The mean over the seeds; behind it by how much it is above the mean draw of `random` on the
    same net, with the standard error of that over the seeds. Of several nets the mean of those."""
    found = [above_random(of_net, criterion, end, key) for of_net in runs]
    if not all(map(len, found)):
        return ""
    digits = 3 if key == "distance" else 2
    text = f"{np.mean([own.mean() for own, _ in (f.T for f in found)]):.{digits}f}"
    if criterion == "random" or min(map(len, found)) < 2:
        return text
    above = float(np.mean([f[:, 1].mean() for f in found]))
    variance = sum(f[:, 1].var(ddof=1) / len(f) for f in found)
    return f"{text} ({above:+.{digits}f} ± {variance**0.5 / len(found):.{digits}f})"


def show_criteria(runs: dict[str, list[dict[str, Found]]]) -> None:
    """Every criterion against chance: cut, compensated, distilled, and the held-out distance."""
    columns = {"cut": ": start", "compensated": ": start", "distilled": "", "distance": ""}
    rows = []
    for criterion in ("random", *CRITERIA):
        for key, end in columns.items():
            nets = [[of_net] for of_net in runs.values()] + [list(runs.values())]
            found = [over_random(some, criterion, end, key) for some in nets]
            rows.append([f"`{criterion}`" if key == "cut" else "", key, *found])
    counts = []
    for name, of_net in runs.items():
        trained_too = sum(CRITERIA[-1] in run for run in of_net)
        counts.append(f"{name} {len(of_net)}, distilled {trained_too}")
    print(f"\n**Criteria**, seeds: {'; '.join(counts)}; {len(RANDOM)} draws of random on each\n")
    print(table(["units by", "", *runs, "mean of the nets"], rows), flush=True)


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|-" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def show(name: str, runs: list[dict[str, Found]], share: float, base: Distillation) -> None:
    """The tables of a net as Markdown."""
    column = {key: [run.get(key, {}) for run in runs] for key in runs[0]}
    first, plain = column["original"], column.get("hessian: start", [])
    print(f"\n**{name}**, {share:.0%} of the multiply-accumulates left: original "
          f"{spread(first, 'float')}, its int8 {spread(first, 'int8')}\n")  # fmt: skip
    rows = []
    for words in ("hessian", f"{LONG} steps", f"{LONG} steps, true labels"):
        if end := column.get(words):
            title = f"{base.steps} steps" if words == "hessian" else words
            found = [
                spread(end, "distilled"),
                spread(end, "int8"),
                gap(end, first, "int8", "float"),
            ]
            rows.append([title, *found])
    print(table(["distilled for", "float", "int8", "int8 - original"], rows) + "\n")
    rows = []
    for words in losses(base):
        if end := column.get("hessian" if words == DEFAULT else words):
            gain = gap(end, plain, "distilled", "compensated")
            rows.append([words, spread(end, "distilled"), gain, spread(end, "distance")])
    print(table(["loss", "distilled", "over no distillation", "distance"], rows), flush=True)


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--seeds", default="0,1,2")
    words.add_argument("--more", default="3,4,5", help="seeds for the criteria alone")
    words.add_argument("--steps", type=int, default=Distillation().steps)
    words.add_argument("--macs", type=float, default=0.3)
    words.add_argument("--models", default=",".join(NETS))
    words.add_argument("--runs", type=Path, default=Path("bench/results/distil_digits.jsonl"))
    words.add_argument("--show", action="store_true", help="print what --runs has, run nothing")
    given = words.parse_args()
    torch.set_num_threads(1)
    base = Distillation(steps=given.steps, threads=1)
    given.runs.parent.mkdir(parents=True, exist_ok=True)
    lines = given.runs.read_text().splitlines() if given.runs.exists() else []
    done: dict[str, Found] = {json.dumps(r["key"]): r["found"] for r in map(json.loads, lines)}
    nets = given.models.split(",")
    runs: dict[str, list[dict[str, Found]]] = {name: [] for name in nets}
    seeds = [int(s) for s in given.seeds.split(",")]
    for seed in [*seeds, *(int(s) for s in given.more.split(",") if s)]:
        for name in nets:
            found: dict[str, Found] = {}
            for cell, fill in cells(
                seed, given.macs, replace(base, seed=seed), name, seed not in seeds
            ):
                key = {"net": name, "seed": seed, "cell": cell}
                key |= {"steps": given.steps, "macs": given.macs}
                if json.dumps(key) not in done and not given.show:
                    begin = time.process_time()
                    values = {k: round(v, 4) for k, v in fill().items()}
                    values["cpu_s"] = round(time.process_time() - begin, 1)
                    done[json.dumps(key)] = values
                    with given.runs.open("a") as file:
                        file.write(json.dumps({"key": key, "found": values}) + "\n")
                if json.dumps(key) in done:
                    found[cell] = done[json.dumps(key)]
            if found:
                runs[name].append(found)
    runs = {name: of_net for name, of_net in runs.items() if of_net}
    for name, of_net in runs.items():
        show(name, of_net[: len(seeds)], given.macs, base)
    if runs:
        show_criteria(runs)


if __name__ == "__main__":
    main()
