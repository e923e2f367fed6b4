"""quantize: static int8 QDQ from calibration data, where it pays and the metric allows.

Calibration, range choice, corrections, placement and writing are files of their own; data
passes between them, and only `write` makes an int8 graph.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter

from edgewright import model as graph
from edgewright.data import Feed, samples
from edgewright.errors import BadInput
from edgewright.metric import retention
from edgewright.quantize import (
    audit,
    build,
    embeddings,
    fidelity,
    headroom,
    placement,
    pricing,
    rollback,
    weights_only,
)
from edgewright.quantize.calibrate import collect
from edgewright.quantize.equalize import equalize
from edgewright.quantize.lstm import lstms, why_float, write_dynamic_lstm
from edgewright.quantize.refine import smoothed
from edgewright.quantize.response import responses
from edgewright.quantize.rewrite import rewritten
from edgewright.quantize.twin import unsigned_twin
from edgewright.quantize.unfit import refuse_outliers, without_empty
from edgewright.runtime.launch import launch_for
from edgewright.runtime.providers import CPU
from edgewright.runtime.timing import cpu_ratio
from edgewright.stage import Job, Report

HELD_SAMPLES = 12
NEAR_DB = 25.0  # outputs at 6 % of their size from the original, for models without a metric
OLDEST_OPSET = 13  # DequantizeLinear with an axis
WIDE_OPSET = 21  # QuantizeLinear to 16 bits
PAY_SAMPLES = 4
HOPELESS = 1.0  # the same before corrections, with room for a second measurement
MUST_PAY = 0.97  # int8 that is not clearly faster is not worth what it costs the metric


def run(job: Job) -> Report:
    """The stage: an int8 model, or the float one with the reason."""
    job = keeping_clusters(job)
    source, scheme, settings = job.input_model(), job.target.int8, job.recipe.quantize
    if settings.scope == "off":
        return stay_float(job, "the recipe says scope = 'off'")
    if settings.weights_only:
        return only_weights(job)
    if scheme.style == "none":
        return stay_float(job, f"target {job.target.name} has no int8 kernels worth using")
    launch_for(job.target)  # what cannot run here is told before the work, not after it
    model = ready(graph.load(source))
    if scheme.steps > 255:
        model = with_opset(model, WIDE_OPSET)
    choices: list[dict[str, Any]] = []
    if isinstance(settings.scope, str):
        model, plan, choices = rewritten(model, settings)
    else:  # its patterns are for the operators that the user sees
        plan = placement.choose(model, settings)
    retained = metric_of(job, source)
    prices: Report = who_decides(job)
    quantized: onnx.ModelProto | None = None
    ingredients: build.Ingredients | None = None
    feeds = list(samples(job.recipe, graph.input_specs(model), PAY_SAMPLES))
    may_be_dynamic = (
        any(n.op_type == "LSTM" for n in graph.all_nodes(model.graph))
        and scheme.dynamic
        and isinstance(settings.scope, str)
    )

    def leave(reason: str) -> Report:
        return stay_float(job, reason, plan.reasons, choices, prices)

    if plan.cores(model):
        ingredients, plan, tried = equalized(job, model, plan)
        choices += tried
        if not plan.cores(model) and not may_be_dynamic:
            return leave("every layer is empty in calibration")
        if prices["clock"] and plan.cores(model):
            plan, ingredients, prices = pricing.drop_losers(
                ingredients, plan, job.target, feeds, job.tell
            )
    elif not may_be_dynamic:
        return leave("no layer of the model has an int8 kernel here")
    if ingredients is not None and plan.cores(model):
        if prices["clock"] and not may_be_dynamic:
            # Corrections change no kernel: what does not pay without them is not worth them.
            ratio = cpu_ratio(build.write(ingredients, plan), source, feeds)
            if ratio > HOPELESS:
                choices.append({"step": "pay", "cpu_ratio": round(ratio, 2)})
                return leave(does_not_pay(ratio))
        ingredients, tried = smoothed(ingredients, plan, calibration(job, model), job.tell)
        choices += tried
        quantized, kept, rows = build.adjust(ingredients, plan, job.tell)
        choices += [{"step": "correction", **row} for row in rows]
        if retained is not None and settings.scope == "auto":
            plan, quantized, asked = hold_metric(job, ingredients, plan, kept, quantized, retained)
            choices += asked
    elif ingredients is not None and not may_be_dynamic:
        return leave("no int8 layer pays on this target, measured one by one")
    if may_be_dynamic:
        quantized, plan, asked = dynamic_lstms(job, model, quantized, plan, retained)
        choices += asked
    if quantized is None:
        return leave("no int8 placement keeps the metric at the recipe's min_retained")
    if prices["clock"]:
        ratio = cpu_ratio(quantized, source, feeds)
        choices.append({"step": "pay", "cpu_ratio": round(ratio, 2)})
        if ratio > MUST_PAY:
            return leave(does_not_pay(ratio))
    if headroom.needed(job.target.int8):
        headroom.prove(quantized)
        if ingredients is not None:
            choices.append({"step": "head-room"} | headroom.figures(ingredients.model, quantized))
    graph.save(quantized, job.output_model())
    try:
        figures, strays = audit.audit(job.output_model(), list(plan.nodes), job.target, job.folder)
    except BaseException:
        job.output_model().unlink(missing_ok=True)
        raise
    made = report(job, model, plan, figures, strays, choices, ingredients, quantized)
    return {**made, "prices": prices}


def only_weights(job: Job) -> Report:
    """The stage on request of `weights_only`: int8 in the file, float arithmetic."""
    source, settings = job.input_model(), job.recipe.quantize
    launch_for(job.target)
    model = ready(graph.load(source))
    scope = settings.scope
    chosen = [
        n.name
        for n in model.graph.node
        if not placement.matches(n, settings.exclude)
        and (isinstance(scope, str) or placement.matches(n, scope))
    ]
    weights, reasons = weights_only.find_weights(model, chosen)
    tables = placement.choose(model, settings).tables
    if not weights and not tables:
        return stay_float(job, "no layer in scope has a stored float32 weight", reasons)
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    blocks = weights_only.blocks_are_fast(job.target)
    forms = weights_only.store_as_int8(stored, weights, blocks=blocks)
    embeddings.shrink(stored, tables)
    held = list(samples(job.recipe, graph.input_specs(model), HELD_SAMPLES))
    judged = fidelity.judged_tensors(model)
    values = (fidelity.values_of(m, judged, held) for m in (model, stored))
    near = round(fidelity.sqnr_db(*values), 2)
    size = round(stored.ByteSize() / model.ByteSize(), 3)
    choice: dict[str, Any] = {"step": "weights only", "sqnr_db": near, "bytes_ratio": size}
    if job.target.run.how == "local" and job.target.runtime.provider == CPU:
        choice["cpu_ratio"] = round(cpu_ratio(stored, source, held[:PAY_SAMPLES]), 2)
    choices = [choice]
    retained = metric_of(job, source) if scope == "auto" else None
    if retained is not None:
        share = retained(stored)
        choices.append({"step": "metric", "retained": round(share, 5)})
        if share < (job.recipe.gate.min_retained or 0.0):
            reason = f"int8 weights keep {100 * share:.2f} % of the metric: less than min_retained"
            return stay_float(job, reason, reasons, choices)
    graph.save(stored, job.output_model())
    try:
        figures, _ = audit.audit(job.output_model(), [], job.target, job.folder)
    except BaseException:
        job.output_model().unlink(missing_ok=True)
        raise
    rows = []
    for node in model.graph.node:
        form = next((forms[i] for i in node.input if i in forms), None)
        why = f"int8 weights, float arithmetic ({form})" if form else reasons.get(node.name)
        if why:
            row = {"node": node.name, "op": node.op_type, "runs_as": "float", "reason": why}
            rows.append(row)
    return {
        "notes": [],
        "scope": scope,
        "stayed_float": False,
        "scheme": {"activations": "float32", "weights": "int8", "per_channel": True},
        "sqnr_db": near,
        "placement": rows,
        "tables": list(tables),
        "audit": figures,
        "prices": who_decides(job),
        "choices": choices,
        "model": graph.summary(job.output_model()),
    }


def keeping_clusters(job: Job) -> Job:
    """The job with only such corrections as leave weights alone, where `share` clustered them:
    other weights would have other codes, and take the entropy back that clustering took out.
    """
    share, settings = job.recipe.share, job.recipe.quantize
    if share is None or not share.codebook or settings.corrections is not True:
        return job
    return replace(job, recipe=replace(job.recipe, quantize=replace(settings, corrections="bias")))


def who_decides(job: Job) -> Report:
    """Whether a clock takes part in choosing layers, and why not; no regions priced yet."""
    settings = job.recipe.quantize
    reason = ""
    if settings.scope != "auto":
        reason = f"the recipe's scope decides ({settings.scope})"
    elif not settings.measure:
        reason = "the recipe says measure = false: rules alone decide"
    elif job.target.run.how != "local":
        why = "emulated time is no time" if job.target.emulated else "its clock is far away"
        reason = f"target {job.target.name} does not run here: {why}"
    elif job.target.runtime.provider != CPU:
        reason = f"{job.target.runtime.provider} tells no times of single layers"
    return {"clock": not reason, "reason": reason, "regions": []}


def does_not_pay(ratio: float) -> str:
    return f"int8 does not pay on this target: {ratio:.2f} of the float model's time"


def metric_of(job: Job, source: Path) -> Callable[[onnx.ModelProto], float] | None:
    """A function: share of the float model's metric that a model keeps; None without a metric."""
    kept = retention(job.recipe, source, job.tell)
    if kept is None or not job.recipe.gate.min_retained:
        return None
    return lambda model: kept(unsigned_twin(model))


def dynamic_lstms(
    job: Job,
    model: onnx.ModelProto,
    quantized: onnx.ModelProto | None,
    plan: placement.Placement,
    retained: Callable[[onnx.ModelProto], float] | None,
) -> tuple[onnx.ModelProto | None, placement.Placement, list[dict[str, Any]]]:
    """Dynamic int8 for the LSTMs, where the metric holds; without one, where outputs stay near.

    quantized: the int8 model so far, None where nothing else is int8.
    """
    before = model if quantized is None else quantized
    exclude = job.recipe.quantize.exclude
    why = {
        node.name: "excluded by the recipe"
        if placement.matches(node, exclude)
        else why_float(node, stored)
        for node, stored in lstms(before.graph, {})
    }
    plan = replace(plan, reasons=plan.reasons | {name: text for name, text in why.items() if text})
    names = [name for name, text in why.items() if not text]
    if not names:
        return quantized, plan, []
    choice: dict[str, Any] = {"step": "dynamic int8 LSTM", "kept": False}
    candidate = write_dynamic_lstm(before, job.target.int8, names)
    if retained is not None:
        share = retained(candidate)
        choice |= {"retained": round(share, 5)}
        keep = share >= reserve(job)
    else:
        judged = fidelity.judged_tensors(model)
        few = list(samples(job.recipe, graph.input_specs(model), HELD_SAMPLES))
        reference = fidelity.values_of(model, judged, few)
        after = fidelity.sqnr_db(reference, fidelity.values_of(candidate, judged, few))
        choice |= {"sqnr_db": round(after, 2)}
        keep = after >= NEAR_DB
    if not keep:
        return quantized, plan, [choice | {"reason": "it costs too much of the metric"}]
    return candidate, plan.adding(names), [choice | {"kept": True}]


def reserve(job: Job) -> float:
    """The share of the metric to aim at: half of the loss that the recipe allows.

    The evaluation set is a sample; the other half is kept for the data it does not show.
    """
    return (1 + (job.recipe.gate.min_retained or 0.0)) / 2


def ready(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name of its own for every node, and with the types of its tensors.

    Raises BadInput where the operator set is too old for a scale per channel.
    """
    if graph.opset(model) < OLDEST_OPSET:
        raise BadInput(
            "int8 needs a newer operator set",
            expected=f"opset {OLDEST_OPSET} or later",
            found=f"opset {graph.opset(model)}",
            hint="run `edgewright simplify` first, it raises the opset",
        )
    graph.name_nodes(model)
    return onnx.shape_inference.infer_shapes(model)


def with_opset(model: onnx.ModelProto, wanted: int) -> onnx.ModelProto:
    """The model in at least that operator set, types inferred; BadInput where it has no form
    there."""
    if graph.opset(model) >= wanted:
        return model
    try:
        raised = onnx.version_converter.convert_version(model, wanted)
    except Exception as error:  # the converter raises RuntimeError and more
        raise BadInput(
            "16-bit activations need a newer operator set than this model has",
            expected=f"opset {wanted}, or a model that can be converted to it",
            found=" ".join(str(error).split())[:200],
            hint="export it with that opset, or use 8-bit activations",
        ) from None
    raised.ir_version = max(raised.ir_version, 10)
    graph.name_nodes(raised)
    return onnx.shape_inference.infer_shapes(raised)


def equalized(
    job: Job, model: onnx.ModelProto, plan: placement.Placement
) -> tuple[build.Ingredients, placement.Placement, list[dict[str, Any]]]:
    """The ingredients, of the equalized model where that is closer to the original.

    The placement comes back without nodes around which calibration saw no value.
    """
    ingredients = prepare(job, model, plan)
    plan = without_empty(model, plan, ingredients.statistics)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    pairs = 0
    if job.recipe.quantize.corrections is True:
        pairs = equalize(changed, plan.nodes, calibration(job, model))
    if pairs == 0:
        return ingredients, plan, []
    other = prepare(job, changed, plan)
    before, after = (build.closeness(i, plan, job.tell) for i in (ingredients, other))
    kept = after > before + build.WORSE_DB
    choice = {
        "step": "equalization",
        "pairs": pairs,
        "sqnr_db_before": round(before, 2),
        "sqnr_db_after": round(after, 2),
        "kept": kept,
    }
    return other if kept else ingredients, plan, [choice]


def calibration(job: Job, model: onnx.ModelProto) -> Callable[[], Iterable[Feed]]:
    """A function that gives the calibration samples, as many as the recipe says, from the start."""
    specs, limit = graph.input_specs(model), job.recipe.quantize.max_samples
    return lambda: samples(job.recipe, specs, limit)


def prepare(job: Job, model: onnx.ModelProto, plan: placement.Placement) -> build.Ingredients:
    """Calibrate, and choose ranges and scales."""
    specs = graph.input_specs(model)
    floats = placement.float_tensors(model)
    wanted = set(plan.nodes)
    touched = [
        t
        for n in model.graph.node
        if n.name in wanted
        for t in [*n.input, *n.output]
        if t in floats and t not in graph.initializers(model.graph)
    ]
    statistics = collect(
        model,
        list(dict.fromkeys(touched)),
        calibration(job, model),
        job.tell,
        job.recipe.quantize.processes,
    )
    refuse_outliers(statistics)
    table = responses(model, list(statistics), statistics)
    scheme = job.target.int8
    fit, held = split(list(samples(job.recipe, specs, build.FIT_SAMPLES + HELD_SAMPLES)))
    judged = fidelity.judged_tensors(model)
    return build.Ingredients(
        model=model,
        scheme=scheme,
        settings=job.recipe.quantize,
        statistics=statistics,
        ranges=build.activation_ranges(statistics, table, scheme, job.recipe.quantize),
        fit=fit,
        held=held,
        judged=judged,
        reference=fidelity.values_of(model, judged, held),
        weights=build.scales_of(model, plan, scheme),
    )


def split(feeds: list[Feed]) -> tuple[list[Feed], list[Feed]]:
    """Feeds to fit corrections on and feeds to judge them by; every fourth is held out.

    With fewer than four samples both are all there is.
    """
    if len(feeds) < 4:
        return feeds, feeds
    held = feeds[3::4][:HELD_SAMPLES]
    return [f for k, f in enumerate(feeds) if k % 4 != 3][: build.FIT_SAMPLES], held


def hold_metric(
    job: Job,
    ingredients: build.Ingredients,
    plan: placement.Placement,
    corrections: list[str],
    quantized: onnx.ModelProto,
    retained: Callable[[onnx.ModelProto], float],
) -> tuple[placement.Placement, onnx.ModelProto | None, list[dict[str, Any]]]:
    """Ask the metric; roll regions back to float until it holds."""
    enough, wanted = job.recipe.gate.min_retained or 0.0, reserve(job)
    share = retained(quantized)
    choices: list[dict[str, Any]] = [
        {"step": "metric", "regions_in_float": 0, "retained": round(share, 5), "wanted": wanted}
    ]
    if share >= wanted:
        return plan, quantized, choices
    plain, plain_share = quantized, share
    if corrections:
        # Closer to the original is not always better by the user's metric: ask before giving
        # up any int8.
        plain = build.write(ingredients, plan)
        plain_share = retained(plain)
        choices.append({"step": "metric without corrections", "retained": round(plain_share, 5)})
        if plain_share >= wanted:
            return plan, plain, choices
    rolled, model, tried = rollback.roll_back(
        ingredients, plan, corrections, retained, wanted, enough, job.tell
    )
    choices += [{"step": "rollback", **t} for t in tried]
    if not any(t["retained"] >= wanted for t in tried):
        # No rollback reached what is wanted: rather all of the int8 that is enough.
        if share >= max(enough, plain_share):
            return plan, quantized, choices
        if plain_share >= enough:
            return plan, plain, choices
    return rolled, model, choices


def report(
    job: Job,
    model: onnx.ModelProto,
    plan: placement.Placement,
    figures: dict[str, Any],
    strays: list[dict[str, str]],
    choices: list[dict[str, Any]],
    ingredients: build.Ingredients | None,
    quantized: onnx.ModelProto,
) -> Report:
    """What was done, node by node."""
    scheme = job.target.int8
    chosen, unfused = set(plan.nodes), {s["node"]: s["reason"] for s in strays}
    rows = []
    for node in graph.all_nodes(model.graph):
        if node.name in chosen and node.name not in unfused:
            rows.append({"node": node.name, "op": node.op_type, "runs_as": "int8", "reason": ""})
        elif node.name in unfused or node.name in plan.reasons:
            reason = unfused.get(node.name) or plan.reasons[node.name]
            rows.append(
                {"node": node.name, "op": node.op_type, "runs_as": "float", "reason": reason}
            )
    notes = [
        {"level": "warning", "text": f"{s['op']} '{s['node']}': {s['reason']}"} for s in strays
    ]
    if scheme.steps > 255 and strays:
        text = f"this runtime has no kernels for {scheme.activations} activations: {len(strays)} "
        notes = [{"level": "warning", "text": text + "layers run in float between Q and DQ"}]
    return {
        "notes": notes,
        "scope": job.recipe.quantize.scope,
        "stayed_float": False,
        "scheme": {
            "activations": scheme.activations,
            "weights": scheme.weights,
            "per_channel": scheme.per_channel,
            "symmetric_activations": scheme.symmetric_activations,
            "ranges": job.recipe.quantize.ranges,
            "calibration_samples": ingredients.samples() if ingredients else 0,
        },
        "sqnr_db": round(build.judge(ingredients, quantized), 2) if ingredients else None,
        "placement": rows,
        "tables": list(plan.tables),
        "audit": figures,
        "choices": choices,
        "model": graph.summary(job.output_model()),
    }


def faster_float(job: Job) -> tuple[onnx.ModelProto, float] | None:
    """The float model with activations written in one node, and its share of the time.

    The runtime fuses HardSwish into a float convolution, not the four nodes some exporters
    write for it. None where there is nothing to rewrite, or where it is not clearly faster.
    """
    # Here, not above: it brings onnx-ir and sympy, 35 MB that calibration has no use for.
    from edgewright.passes.activations import canonical_activations

    source = job.input_model()
    model = graph.load(source)
    changed = canonical_activations(model)
    if graph.count_nodes(changed) == graph.count_nodes(model):
        return None
    feeds = list(samples(job.recipe, graph.input_specs(model), PAY_SAMPLES))
    ratio = cpu_ratio(changed, source, feeds)
    return (changed, round(ratio, 2)) if ratio < MUST_PAY else None


def stay_float(
    job: Job,
    reason: str,
    reasons: dict[str, str] | None = None,
    choices: list[dict[str, Any]] | None = None,
    prices: Report | None = None,
) -> Report:
    """Pass the model on in float, saying why; with faster activations where those pay here."""
    choices = list(choices or [])
    fused = faster_float(job) if who_decides(job)["clock"] else None
    if fused is None:
        shutil.copyfile(job.input_model(), job.output_model())
    else:
        model, ratio = fused
        graph.save(model, job.output_model())
        choices.append({"step": "HardSwish and HardSigmoid as one node", "cpu_ratio": ratio})
    rows = [
        {"node": n, "op": "", "runs_as": "float", "reason": r} for n, r in (reasons or {}).items()
    ]
    return {
        "notes": [{"level": "warning", "text": f"the model stays float: {reason}"}],
        "scope": job.recipe.quantize.scope,
        "stayed_float": True,
        "reason": reason,
        "placement": rows,
        "audit": None,
        "prices": prices or who_decides(job),
        "choices": choices,
        "model": graph.summary(job.output_model()),
    }
