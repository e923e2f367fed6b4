"""share: equal tensors stored once, and k-means codebooks in place of weights of their own.

All weights of a layer (or of the model) take one of a few values, as in Deep Compression (Han et
al., 1510.00149, section 3): the nearest, or the one that training ends at (`recover.assign`). It
makes what is sent smaller, never what is computed: no runtime kernel reads codebooks. Each output
channel keeps a scale of its own; without it, 256 entries already ruin a network whose
normalisations are folded (facts/prune.md 5).
"""

import lzma
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from edgewright import model as graph
from edgewright.codebooks import ShareSettings
from edgewright.data import samples
from edgewright.metric import retention
from edgewright.passes.duplicates import merge_tensors
from edgewright.passes.names import free_name
from edgewright.recipe import Distillation
from edgewright.recover import needs_torch
from edgewright.stage import Job, Report
from edgewright.target import Target

MIN_VALUES = 256  # below, codebook and codes weigh more than they save
MOST_ENTRIES = 256  # codes of one byte
ITERATIONS = 50
BINS = 4096
ZEROS = 0.01  # share of exact zeros from which zero gets an entry of its own
# Axis of the output channels in the stored weight, by operator and input.
AXES = {
    ("Conv", 1): 0,
    ("ConvTranspose", 1): 1,
    ("MatMul", 1): -1,
    ("MatMul", 0): -2,
    ("LSTM", 1): 1,
    ("LSTM", 2): 1,
    ("GRU", 1): 1,
    ("GRU", 2): 1,
    ("RNN", 1): 1,
    ("RNN", 2): 1,
    ("Gather", 0): 0,
}


@dataclass(frozen=True)
class Clustered:
    """One weight as scale * codebook[codes]: codes uint8 in the weight's shape, scale broadcast."""

    codes: np.ndarray
    codebook: np.ndarray
    scale: np.ndarray

    def values(self) -> np.ndarray:
        """The weight, float32."""
        made: np.ndarray = self.codebook[self.codes] * self.scale
        return made.astype(np.float32)


def run(job: Job) -> Report:
    """The stage: store equal tensors once, then cluster the weights where the metric holds."""
    source = job.input_model()
    settings = job.recipe.share or ShareSettings()
    model = graph.load(source)
    stored = stored_bytes(model)
    model = merged(model)
    report: dict[str, Any] = {
        "notes": [],
        "duplicate_bytes": stored - stored_bytes(model),
        "codebooks": [],
        "tries": [],
        "form": "values",
    }
    if settings.codebook:
        model = cluster(job, settings, model, report)
    graph.save(model, job.output_model())
    return {
        **report,
        "sent_bytes": {
            "before": sent_bytes(source.read_bytes()),
            "after": sent_bytes(job.output_model().read_bytes()),
        },
        "model": graph.summary(job.output_model()),
    }


def sent_bytes(data: bytes) -> int:
    """Size after entropy coding (xz): what a compressed transport carries."""
    return len(lzma.compress(data, preset=6))


def stored_bytes(model: onnx.ModelProto) -> int:
    return sum(t.ByteSize() for t in model.graph.initializer)


def merged(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with equal tensors of the main graph stored once."""
    inside = ir.from_proto(model)
    merge_tensors(inside.graph)
    return ir.to_proto(inside)


def cluster(
    job: Job, settings: ShareSettings, model: onnx.ModelProto, report: Report
) -> onnx.ModelProto:
    """The model with clustered weights; with more entries, or unclustered, where the metric asks.

    Fills `codebooks`, `tries`, `form` and `notes` of the report.
    """
    axes = weight_axes(model)
    if not axes:
        note(report, f"no weight has {MIN_VALUES} values or more: nothing to cluster")
        return model
    retained = retention(job.recipe, job.models.get("export", job.input_model()), job.tell)
    before = None if retained is None else retained(model)
    entries = settings.codebook
    while True:
        job.tell(f"clustering weights into {entries} values", 0, len(axes))
        found = clusters(model, axes, entries, settings.scope, job.tell)
        if settings.assignment == "soft":
            found, report["training"] = softly(job, settings, model, found)
        changed = with_values(model, found)
        if retained is None or before is None:
            note(report, "no metric: what the codebooks cost is not known before validate")
            break
        drop = before - retained(changed)
        kept = drop <= settings.max_drop
        report["tries"].append({"entries": entries, "drop": round(drop, 5), "kept": kept})
        if kept:
            break
        if entries == MOST_ENTRIES:
            note(report, f"even {entries} values cost {drop:.2%} of the metric: left as they were")
            report.pop("training", None)
            return model
        entries = min(2 * entries, MOST_ENTRIES)
    if entries > settings.codebook:
        text = f"{settings.codebook} values cost more than {settings.max_drop:.2%} of the metric"
        note(report, f"{text}: {entries} are used")
    report["codebooks"] = [row(model, name, one) for name, one in found.items()]
    if stays_float(job):
        report["form"] = "codes"
        return with_codes(model, found)
    return changed


def softly(
    job: Job, settings: ShareSettings, model: onnx.ModelProto, hard: dict[str, Clustered]
) -> tuple[dict[str, Clustered], Report]:
    """The clusters after training that started from them, and how it went.

    Raises EnvironmentMissing where torch is not installed.
    """
    with needs_torch("a soft assignment", 'share.assignment to "hard"'):
        from edgewright.recover.assign import Shared, assign
    weights = {name: graph.array(t) for name, t in graph.initializers(model.graph).items()
               if name in hard}  # fmt: skip
    books = {one.codebook.tobytes(): one.codebook for one in hard.values()}
    number = {key: k for k, key in enumerate(books)}
    shared = {
        name: Shared(weights[name] / one.scale, one.scale, number[one.codebook.tobytes()])
        for name, one in hard.items()
    }
    lesson = Distillation(**vars(settings.train), vary=0)
    if job.unfinished is not None:
        job.unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
    specs = graph.input_specs(model)
    shares, trained, told = assign(
        model, shared, list(books.values()),
        lambda: samples(job.recipe, specs, settings.train.samples), lesson,
        job.unfinished, job.tell,
    )  # fmt: skip
    found = {}
    for name, one in hard.items():
        book = trained[shared[name].book]
        found[name] = Clustered(nearest(shares[name], book).astype(np.uint8), book, one.scale)
    return found, told


def note(report: Report, text: str) -> None:
    report["notes"].append({"level": "warning", "text": text})


def stays_float(job: Job) -> bool:
    """Whether no int8 follows, whose codes would take the place of ours."""
    target: Target = job.target
    return job.recipe.quantize.scope == "off" or target.int8.style == "none"


def weight_axes(model: onnx.ModelProto) -> dict[str, int]:
    """The stored float weights worth clustering, with the axis that its first reader has
    the output channels on: one scale for each of its indices.
    """
    stored = graph.initializers(model.graph)
    axes: dict[str, int] = {}
    for node in graph.all_nodes(model.graph):
        for k, name in enumerate(node.input):
            axis = AXES.get((node.op_type, k))
            if node.op_type == "Gemm" and k == 1:
                axis = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
            tensor = stored.get(name)
            if axis is None or tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
                continue
            if len(tensor.dims) < 2 or int(np.prod(tensor.dims)) < MIN_VALUES:
                continue
            axes.setdefault(name, axis % len(tensor.dims))
    return axes


def clusters(
    model: onnx.ModelProto,
    axes: dict[str, int],
    entries: int,
    scope: str,
    tell: Callable[[str, int, int], None],
) -> dict[str, Clustered]:
    """Every weight clustered: a codebook per layer, or one for the model."""
    stored = graph.initializers(model.graph)
    weights = {name: graph.array(stored[name]) for name in axes}
    scales = {name: channel_peaks(weights[name], axis) for name, axis in axes.items()}
    book: np.ndarray | None = None
    if scope == "model":
        book = codebook_of(
            np.concatenate([(weights[n] / scales[n]).ravel() for n in axes]), entries
        )
    found = {}
    for k, (name, weight) in enumerate(weights.items()):
        tell(f"clustering weights into {entries} values", k, len(axes))
        shares = weight / scales[name]
        codebook = codebook_of(shares.ravel(), entries) if book is None else book
        codes = nearest(shares, codebook)
        found[name] = Clustered(codes.astype(np.uint8), codebook, scales[name])
    return found


def channel_peaks(weight: np.ndarray, axis: int) -> np.ndarray:
    """Largest magnitude per index of the axis, shaped to broadcast; 1 where all is zero."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    peak = np.abs(weight).max(axis=others, keepdims=True)
    return np.where(peak > 0, peak, 1).astype(np.float32)


def codebook_of(shares: np.ndarray, entries: int) -> np.ndarray:
    """The values that shares of a channel's peak take: -1, 1 and the centres of the others.

    With the peak itself among them each channel keeps its int8 scale, so that int8 codes made
    of the clustered weights are no more different values than the codebook has.
    """
    if entries < 4:
        return k_means(shares, entries)
    inner = shares[np.abs(shares) < 1]
    centres = k_means(inner, entries - 2) if inner.size else inner
    return np.unique(np.append(centres, [-1, 1]).astype(np.float32))


def k_means(values: np.ndarray, entries: int) -> np.ndarray:
    """Sorted centres, float32, at most `entries`: Lloyd's iteration on one axis, exact per step.

    Starts where the optimal quantizer of a smooth density has its points, spaced by the cube
    root of the density (Panter and Dite, 1951), so no random start is needed. Where many values
    are exactly zero, as after unstructured pruning, zero is one of the centres.
    """
    flat = np.sort(values.astype(np.float64))
    distinct = np.unique(flat)
    if distinct.size <= entries:
        return distinct.astype(np.float32)
    if np.count_nonzero(flat == 0) > ZEROS * flat.size and entries > 1:
        others = k_means(flat[flat != 0], entries - 1)
        return np.unique(np.append(others, np.float32(0)))
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    counts, edges = np.histogram(flat, BINS)
    mass = np.cumsum(np.cbrt(counts))
    at = np.searchsorted(mass, (np.arange(entries) + 0.5) / entries * mass[-1])
    centres = np.unique((edges[at] + edges[at + 1]) / 2)
    for _ in range(ITERATIONS):
        cuts = np.searchsorted(flat, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate([[0], cuts, [flat.size]])
        sizes = np.diff(bounds)
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / np.maximum(sizes, 1)
        moved = np.where(sizes > 0, means, centres)
        if np.allclose(moved, centres, rtol=0, atol=1e-7):
            break
        centres = moved
    return np.unique(centres.astype(np.float32))


def nearest(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest of the sorted centres."""
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, values)


def with_values(model: onnx.ModelProto, found: dict[str, Clustered]) -> onnx.ModelProto:
    """A copy whose weights have the clustered values."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = graph.initializers(copy.graph)
    for name, one in found.items():
        stored[name].CopyFrom(numpy_helper.from_array(one.values(), name))
    return copy


def with_codes(model: onnx.ModelProto, found: dict[str, Clustered]) -> onnx.ModelProto:
    """A copy that stores codes, codebook and scales, and makes each weight from them.

    The runtime computes these nodes once, while it loads: constants in, a constant out.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [t for t in copy.graph.initializer if t.name not in found]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    taken = {o for n in graph.all_nodes(model.graph) for o in [n.name, *n.output]}
    taken |= {t.name for t in model.graph.initializer}
    makers = []

    def fresh(name: str) -> str:
        taken.add(made := free_name(name, taken, frozenset()))
        return made

    def store(array: np.ndarray, name: str) -> str:
        made = fresh(name)
        copy.graph.initializer.append(numpy_helper.from_array(array, made))
        return made

    books: dict[bytes, str] = {}
    for name, one in found.items():
        codes = store(one.codes, f"{name}_codes")
        key = one.codebook.tobytes()
        if key not in books:
            books[key] = store(one.codebook, f"{name}_codebook")
        scale = store(one.scale, f"{name}_scale")
        index, share = fresh(f"{name}_index"), fresh(f"{name}_share")
        makers += [
            helper.make_node("Cast", [codes], [index], name=index, to=onnx.TensorProto.INT32),
            helper.make_node("Gather", [books[key], index], [share], name=share),
            helper.make_node("Mul", [share, scale], [name], name=fresh(f"{name}_value")),
        ]
    nodes = [*makers, *copy.graph.node]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def row(model: onnx.ModelProto, name: str, one: Clustered) -> dict[str, Any]:
    """One weight in the report: entries used, bits per weight by entropy, relative error."""
    weight = graph.array(graph.initializers(model.graph)[name])
    counts = np.bincount(one.codes.ravel(), minlength=len(one.codebook))
    shares = counts[counts > 0] / one.codes.size
    energy = float(np.square(weight, dtype=np.float64).sum())
    error = float(np.square(weight - one.values(), dtype=np.float64).sum())
    return {
        "tensor": name,
        "values": int(weight.size),
        "entries": int(shares.size),
        "entropy_bits": round(float(-(shares * np.log2(shares)).sum()), 3),
        "relative_error": round((error / energy) ** 0.5, 5) if energy else 0.0,
    }
