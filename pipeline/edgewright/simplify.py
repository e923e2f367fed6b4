"""The stage that makes a model smaller and plainer without changing what it computes.

Newer operator set, the recipe's input shapes, constants folded, shape arithmetic resolved,
normalisations and other affine maps inside the weights, nothing twice, nothing unread. The
result is proved against the source on calibration inputs, and on one of them doubled along each
free dimension. If that fails the steps are applied again one by one, each proved before the
next, and a step that breaks the model is left out and reported.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from edgewright import model as files
from edgewright.data import Feed, samples
from edgewright.errors import BadInput
from edgewright.passes.branches import decide_branches
from edgewright.passes.clips import unify_clips
from edgewright.passes.constants import fold_constants, store_constants
from edgewright.passes.duplicates import merge_duplicates, remove_dead
from edgewright.passes.edit import all_nodes
from edgewright.passes.gelu import order_gelus
from edgewright.passes.inputs import forget_shapes, set_input_shapes
from edgewright.passes.layer_norm import find_layer_norms
from edgewright.passes.linear import fold_affine
from edgewright.passes.names import assign_names, names_in
from edgewright.passes.noops import remove_noops
from edgewright.passes.opset import NEWEST, TARGET, opset, raise_opset, unflatten_softmax
from edgewright.passes.pads import fold_pads
from edgewright.passes.pooling import pool_means
from edgewright.passes.shapes import infer, resolve_shapes
from edgewright.passes.tables import gather_one_hot, tabulate
from edgewright.passes.transposes import unwrap_transposes
from edgewright.runtime.local import open_local
from edgewright.stage import Job, Report

SAMPLES = 8
ROUNDS = 4  # what one step uncovers, another may use; the rounds end when nothing changes
NEEDED_OPSET = 13  # per-channel quantization, and the form of operators the passes expect
MIN_SQNR_DB = 80.0
MAX_RELATIVE = 1e-4
EQUAL_DB = 200.0
MIN_IR_VERSION = 8  # that of operator set 17; from 4 on stored tensors need not be inputs

Outputs = list[list[np.ndarray]]


@dataclass
class Step:
    """One application of a pass, as reported."""

    name: str
    nodes_before: int
    nodes_after: int
    applied: bool
    reason: str


@dataclass
class Proof:
    """How far outputs lie from the reference, over all samples."""

    equal: bool
    max_abs: float
    sqnr_db: dict[str, float]
    why: str = ""


@dataclass
class Work:
    """A model on its way through the steps."""

    model: ir.Model
    names: frozenset[str]
    steps: list[Step] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


def resolve(model: ir.Model) -> int:
    return resolve_shapes(model) + unflatten_softmax(model) + decide_branches(model)


def look_up(model: ir.Model) -> int:
    return gather_one_hot(model) + tabulate(model, evaluate)


def evaluate(model: ir.Model) -> np.ndarray:
    """The output of a model without inputs, every node as it is written."""
    data = ir.to_proto(model).SerializeToString()
    return open_local(data, optimize=False).run({})[0]


STEPS: tuple[tuple[str, Callable[[ir.Model], int]], ...] = (
    ("operator set", raise_opset),
    ("folding constants", fold_constants),
    ("shape arithmetic", resolve),
    ("operators without effect", remove_noops),
    ("transposes in reshapes", unwrap_transposes),
    ("duplicates", merge_duplicates),
    ("limits", unify_clips),
    ("padding into convolutions", fold_pads),
    ("means to global pooling", pool_means),
    ("layer normalisation", find_layer_norms),
    ("order of factors in GELU", order_gelus),
    ("affine maps into weights", fold_affine),
    ("look-up tables", look_up),
)


def run(job: Job) -> Report:
    """Simplify the job's model; see the module."""
    source = files.load(job.input_model())
    before = facts(source, job.input_model().stat().st_size)
    old_opset, metadata = files.opset(source), {p.key: p.value for p in source.metadata_props}
    notes: list[dict[str, str]] = []

    def note(level: str, text: str) -> None:
        notes.append({"level": level, "text": text})

    kept = names_in(ir.from_proto(source))
    prepared = prepare(source, job, note)
    feeds = list(samples(job.recipe, files.input_specs(prepared), limit=SAMPLES))
    count = len(feeds)
    job.tell("simplifying: running the original", 0, len(STEPS) + 2)
    original = open_local(job.input_model())
    reference = [original.run(feed) for feed in feeds]
    doubled = []
    for name, feed in doubled_feeds(prepared, feeds[0]).items():
        try:
            reference.append(original.run(feed))
        except BadInput as error:
            note("info", f"free dimension '{name}' not tried at another size: {error}")
            continue
        feeds.append(feed)
        doubled.append(name)
    del original
    names = [v.name for v in source.graph.output]
    del source

    work = simplified(prepared, kept, job, None)
    proof = prove(work.model, names, feeds, reference)
    if not proof.equal or work.broken:
        work = simplified(prepared, kept, job, lambda m: prove(m, names, feeds, reference))
        proof = prove(work.model, names, feeds, reference)
    for name, reason in work.broken.items():
        note("warning", f"step '{name}' was left out: {reason}")
    if not proof.equal:
        note("warning", f"the model ships as it came, only its input shapes set: {proof.why}")
        result = prepared
        proof = compare(names, reference, outputs_of(prepared.SerializeToString(), feeds))
    else:
        result = finish(work, metadata)
    if old_opset > NEWEST:
        note(
            "warning",
            f"operator set {old_opset} is newer than {NEWEST}, the newest whose static "
            "quantization the runtime supports; the model stays at it",
        )
    job.tell("simplifying: writing", len(STEPS) + 2, len(STEPS) + 2)
    files.save(result, job.output_model())
    return {
        "notes": notes,
        "before": before,
        "after": facts(result, job.output_model().stat().st_size),
        "steps": [vars(step) for step in work.steps],
        "opset": {"before": old_opset, "after": files.opset(result)},
        "equality": {
            "samples": count,
            "doubled": doubled,
            "max_abs": proof.max_abs,
            "sqnr_db": proof.sqnr_db,
        },
        "model": files.summary(job.output_model()),
    }


def facts(model: onnx.ModelProto, size: int) -> dict[str, Any]:
    return {
        "nodes": files.count_nodes(model),
        "bytes": size,
        "operators": files.op_histogram(model),
    }


def prepare(source: onnx.ModelProto, job: Job, note: Callable[[str, str], None]) -> onnx.ModelProto:
    """The source with the recipe's input shapes, functions inlined and unique names."""
    model = ir.from_proto(source)
    if model.functions:
        note("info", f"{len(model.functions)} functions inlined")
        InlinePass()(model)
    names = names_in(model)
    count = len(model.graph.inputs)
    RemoveInitializersFromInputsPass()(model)
    if len(model.graph.inputs) < count:
        stored = count - len(model.graph.inputs)
        note("info", f"{stored} stored tensors are no longer listed as inputs")
    model.ir_version = max(model.ir_version, MIN_IR_VERSION)
    shapes = {name: item.shape for name, item in job.recipe.model.inputs.items()}
    _, told = set_input_shapes(model, shapes)
    for text in told:
        note("warning", text)
    forget_shapes(model)
    assign_names(model, names)
    return ir.to_proto(model)


def simplified(
    prepared: onnx.ModelProto,
    kept: frozenset[str],
    job: Job,
    check: Callable[[ir.Model], Proof] | None,
) -> Work:
    """Apply the steps in rounds; `kept` are the names of the source.

    With `check`, each change is proved before the next step, and a step that fails is undone
    and not tried again; without, the first failure ends the work.
    """
    model = ir.from_proto(prepared)
    work = Work(model, kept)
    store_constants(model)
    tidy(work)
    saved = ir.to_proto(work.model) if check else None
    for turn in range(ROUNDS):
        changed = False
        for k, (name, apply) in enumerate(STEPS):
            if name in work.broken:
                continue
            job.tell(f"simplifying: {name}", k + 1, len(STEPS) + 2)
            count = len(all_nodes(work.model))
            try:
                changes = apply(work.model)
                if changes:
                    tidy(work)
                    why = check(work.model).why if check else ""
                else:
                    why = ""
            except Exception as error:  # any failure of a pass is a reason to do without it
                changes, why = 1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if why:
                work.broken[name] = why
                work.steps.append(Step(name, count, count, False, why))
                if saved is None:
                    return work
                work.model = ir.from_proto(saved)
            elif changes:
                changed = True
                after = len(all_nodes(work.model))
                work.steps.append(
                    Step(name, count, after, True, f"{changes} change{'s'[: changes != 1]}")
                )
                saved = ir.to_proto(work.model) if check else None
            elif turn == 0:
                work.steps.append(Step(name, count, count, False, "nothing to do"))
            if opset(work.model) < min(NEEDED_OPSET, TARGET):
                work.steps.append(
                    Step("all others", count, count, False, "the operator set is too old for them")
                )
                return work
        if not changed:
            break
    return work


def tidy(work: Work) -> None:
    """Between steps: nothing unread, unique names, types and shapes known."""
    remove_dead(work.model)
    assign_names(work.model, work.names)
    infer(work.model)


def finish(work: Work, metadata: dict[str, str]) -> onnx.ModelProto:
    """The model to write: final names, no traces of exporter or tools in nodes and values.

    Stack traces an exporter leaves there are as large as the graph and tell of its machine.
    """
    model = work.model
    while remove_dead(model):
        pass
    model.graph.sort()
    assign_names(model, work.names)
    for graph in model.graphs():
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
        graph.metadata_props.clear()
    for node in all_nodes(model):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    used = {node.domain for node in all_nodes(model)} | {""}
    for domain in set(model.opset_imports) - used:
        del model.opset_imports[domain]
    proto = ir.to_proto(model)
    assert {p.key: p.value for p in proto.metadata_props} == metadata
    onnx.checker.check_model(proto)
    return proto


def doubled_feeds(model: onnx.ModelProto, feed: Feed) -> dict[str, Feed]:
    """For each free dimension a feed twice as large along it, by its name.

    Calibration inputs often have one size; that the model still takes others must be proved too.
    """
    axes: dict[str, list[tuple[str, int]]] = {}
    for value in files.real_inputs(model):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                axes.setdefault(dim.dim_param, []).append((value.name, axis))
    result = {}
    for name, places in axes.items():
        larger = dict(feed)
        for place, axis in places:
            larger[place] = np.concatenate([larger[place]] * 2, axis)
        result[name] = larger
    return result


def outputs_of(model: bytes, feeds: list[Feed]) -> Outputs:
    """The outputs for each sample, from a session that lives no longer than this call."""
    session = open_local(model)
    return [session.run(feed) for feed in feeds]


def prove(model: ir.Model, names: list[str], feeds: list[Feed], reference: Outputs) -> Proof:
    """Compare the model's outputs with the reference; a model that does not run is not equal."""
    try:
        found = outputs_of(ir.to_proto(model).SerializeToString(), feeds)
    except Exception as error:  # whatever the runtime or the conversion says is the reason
        return Proof(False, 0.0, {}, " ".join(str(error).split())[:300])
    return compare(names, reference, found)


def compare(names: list[str], reference: Outputs, found: Outputs) -> Proof:
    """Float outputs may differ by rounding: SQNR of 80 dB or 1e-4 of the largest value. Others,
    types, shapes and the places of NaN and infinities must be the same.
    """
    sqnr_db: dict[str, float] = {}
    largest = 0.0
    for k, name in enumerate(names):
        signal = noise = peak = gap = 0.0
        for expected, got in ((e[k], g[k]) for e, g in zip(reference, found, strict=True)):
            if not isinstance(expected, np.ndarray) or expected.dtype.kind != "f":
                if not same(expected, got):
                    return Proof(False, largest, sqnr_db, f"output '{name}' has other values")
                continue
            if expected.dtype != got.dtype or expected.shape != got.shape:
                text = f"{got.dtype}{list(got.shape)}, not {expected.dtype}{list(expected.shape)}"
                return Proof(False, largest, sqnr_db, f"output '{name}' is {text}")
            a, b = expected.astype(np.float64), got.astype(np.float64)
            finite = np.isfinite(a)
            if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
                return Proof(False, largest, sqnr_db, f"output '{name}' is finite elsewhere")
            a, b = a[finite], b[finite]
            signal += float(np.square(a).sum())
            noise += float(np.square(a - b).sum())
            peak = max(peak, float(np.abs(a).max(initial=0)))
            gap = max(gap, float(np.abs(a - b).max(initial=0)))
        largest = max(largest, gap)
        ratio = EQUAL_DB if noise == 0 else 10 * np.log10(max(signal, 1e-300) / noise)
        sqnr_db[name] = round(float(min(ratio, EQUAL_DB)), 2)
        if sqnr_db[name] < MIN_SQNR_DB and gap > MAX_RELATIVE * peak:
            text = f"output '{name}' differs by up to {gap:.3g} ({sqnr_db[name]} dB)"
            return Proof(False, largest, sqnr_db, text)
    return Proof(True, largest, sqnr_db)


def same(a: Any, b: Any) -> bool:
    """Equality of outputs that are no float tensors: numbers, texts, sequences, maps."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, list):
        return (
            isinstance(b, list)
            and len(a) == len(b)
            and all(same(x, y) for x, y in zip(a, b, strict=True))
        )
    return bool(a == b)
