"""What will hurt a model on a target, before any calibration: from the graph alone.

Every node-wise check looks at the model as it came, and again after each of simplify's steps,
which are really applied here; what a step takes away is reported as mended by it. So the column
"fixed by" is no promise.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
import onnx_ir as ir

from edgewright.lint import activations, files, operators, scales
from edgewright.lint.finding import Finding, Hit, group
from edgewright.passes.activations import canonical_activations
from edgewright.passes.branches import decide_branches
from edgewright.passes.clips import unify_clips
from edgewright.passes.constants import fold_constants, store_constants
from edgewright.passes.duplicates import merge_duplicates, remove_dead
from edgewright.passes.edit import all_nodes, matching
from edgewright.passes.layer_norm import find_layer_norms
from edgewright.passes.linear import fold_affine
from edgewright.passes.names import assign_names, names_in
from edgewright.passes.noops import remove_noops
from edgewright.passes.opset import NotConvertible, raise_opset, unflatten_softmax
from edgewright.passes.pads import fold_pads
from edgewright.passes.pooling import pool_means
from edgewright.passes.shapes import infer, resolve_shapes
from edgewright.target import Target
from edgewright.work import node_work

CPU = "CPUExecutionProvider"
ROUNDS = 4  # as simplify; they end when nothing changes


def resolve(model: ir.Model) -> int:
    return resolve_shapes(model) + unflatten_softmax(model) + decide_branches(model)


# simplify's steps that change what the checks look at, in its order and by its names.
STEPS: tuple[tuple[str, Callable[[ir.Model], int]], ...] = (
    ("operator set", raise_opset),
    ("folding constants", fold_constants),
    ("shape arithmetic", resolve),
    ("operators without effect", remove_noops),
    ("duplicates", merge_duplicates),
    ("limits", unify_clips),
    ("padding into convolutions", fold_pads),
    ("means to global pooling", pool_means),
    ("layer normalisation", find_layer_norms),
    ("affine maps into weights", fold_affine),
)


def lint(model: onnx.ModelProto, facts: dict[str, Any], target: Target) -> list[Finding]:
    """What will hurt on the target: warnings first, the dearest of them first.

    model: as admitted; it stays as it is. facts: `inspection.describe` of it, with "bytes".
    """
    try:
        items, fixed = node_work(model)
    except Exception:  # told as unknown work by `describe`
        items, fixed = [], 0
    macs = {key: count for _, key, count in items if count is not None}
    try:
        steps = Steps(model, target)
    except Exception as error:  # a pass on a strange model: no reason to say nothing at all
        text = f"the nodes were not looked at: {type(error).__name__}: {error}"
        found = list(files.findings(model, facts, target, "", control_nodes(ir.from_proto(model))))
        return [*found, Finding("lint", "warning", " ".join(text.split())[:300])]
    found = list(files.findings(model, facts, target, steps.stuck, control_nodes(steps.model)))
    left = len(all_nodes(steps.model))
    found += files.free_dimensions(model, facts, target, (steps.nodes_folded, fixed or left))
    if target.int8.style != "none":
        if target.runtime.provider != CPU:
            text = f"which operators have int8 kernels is known for {CPU}, not for "
            found.append(Finding("unknown-kernels", "info", text + target.runtime.provider))
        found += group(steps.hits, steps.labels, macs, sum(macs.values()))
    order = {"warning": 0, "info": 1}
    return sorted(found, key=lambda f: (order[f.level], bool(f.fixed_by), -(f.share or 0.0)))


def control_nodes(model: ir.Model) -> int:
    return sum(n.op_type in files.CONTROL for n in all_nodes(model))


class Steps:
    """The model on its way through simplify's steps, and what the checks found on the way.

    hits: what stays, and what a step mended. stuck: why the operator set stays, or "".
    nodes_folded: nodes left when constants and shapes are folded.
    """

    def __init__(self, model: onnx.ModelProto, target: Target) -> None:
        self.target = target
        self.model = ir.from_proto(model)
        self.names = names_in(self.model)
        self.labels: dict[str, str] = {}
        self.chains: dict[str, Hit] = {}
        self.mixed: dict[str, Hit] = {}
        self.stuck = ""
        self.nodes_folded = 0
        store_constants(self.model)
        self.tidy()
        before: list[Hit] = self.check()
        came = {(h.kind, h.key) for h in before}
        mended: list[Hit] = []
        for _ in range(ROUNDS):
            changed = False
            for name, step in STEPS:
                if self.apply(step):
                    changed = True
                    self.tidy()
                    after = self.check()
                    left = {(h.kind, h.key) for h in after}
                    gone = [h for h in before if (h.kind, h.key) not in left]
                    mended += [mended_by(h, f"simplify: {name}") for h in gone]
                    before = after
                if name == "shape arithmetic":
                    self.nodes_folded = len(all_nodes(self.model))
            if not changed:
                break
        if target.runtime.provider == CPU:
            before = [h for h in before if h.kind != "activation"] + self.activations()
        left = {(h.kind, h.key) for h in before}
        gone = [h for h in mended if (h.kind, h.key) in came - left]
        self.hits = [*before, *gone]

    def apply(self, step: Callable[[ir.Model], int]) -> int:
        """Apply one step; none to a model whose operator set cannot be raised."""
        if self.stuck:
            return 0
        if step is raise_opset:
            trial = ir.from_proto(ir.to_proto(self.model))
            try:
                changes = step(trial)
            except NotConvertible as error:  # leaves the model half converted
                self.stuck = str(error)
                return 0
            self.model = trial
            return changes
        return step(self.model)

    def tidy(self) -> None:
        """What simplify does between steps."""
        remove_dead(self.model)
        assign_names(self.model, self.names)
        infer(self.model)
        for node in all_nodes(self.model):
            key = operators.key(node)
            self.labels.setdefault(
                key, str(node.name) if node.name in self.names else f"(makes {key})"
            )

    def check(self) -> list[Hit]:
        """All node-wise checks of the model as it is now."""
        # A factor that folds into weights is no longer seen, but the values stay as large.
        for hit in scales.mixed_ranges(self.model):
            self.mixed.setdefault(hit.key, hit)
        concats = {operators.key(n) for n in matching(self.model, "Concat")}
        found = [h for k, h in self.mixed.items() if k in concats]
        found += scales.shared_weights(self.model)
        found += scales.spread_weights(self.model, self.target)
        if self.target.runtime.provider != CPU:
            return found
        found += operators.hits(self.model, self.target)
        found += [*activations.activations(self.model), *activations.clips(self.model)]
        now = {h.key: h for h in found if h.kind == "batchnorm"}
        lost = {k: h for k, h in self.chains.items() if k not in now}
        self.chains |= now
        return found + [lost[k] for k in sorted(operators.left_of_chains(self.model, set(lost)))]

    def activations(self) -> list[Hit]:
        """Activations where those that exporters write out are one node each."""
        joined = ir.from_proto(canonical_activations(ir.to_proto(self.model)))
        infer(joined)
        for node in all_nodes(joined):
            maker = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
            if maker is not None and operators.key(node) not in self.labels:
                before = self.labels.get(operators.key(maker), maker.name)
                self.labels[operators.key(node)] = f"(behind {before})"
        return [*activations.activations(joined), *activations.clips(joined)]


def mended_by(hit: Hit, step: str) -> Hit:
    """The hit as it is told where a step took it away."""
    return replace(hit, level="info", fixed_by=step, remedy="rewritten")
