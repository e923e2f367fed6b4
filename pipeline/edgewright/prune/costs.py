"""What units cost: multiply-accumulates, parameters or bytes, as products of axis lengths.

Every cost is a sum of terms, every term a product of lengths of tensor axes: a convolution costs
its output's axes times its weight's axes behind the first, a stored tensor its axes times its item
size. Removing a unit shortens the axes that carry its label, so what a unit saves depends on what
is left of its neighbours, and is computed without touching the graph. What `outputs.opened` added
costs nothing while it is whole: `cut` takes it out then.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx

from edgewright.errors import BadInput
from edgewright.prune.labels import Analysis
from edgewright.prune.outputs import MATRIX, PRODUCT, SHIFT, whole
from edgewright.work import RECURRENT, WORK, Shape, node_macs, shapes_of, transposed

Kind = Literal["macs", "params", "size_bytes"]
Axis = tuple[str, int]


class Costs:
    """The cost of a model as units go. `total` is the original's, `now` what is left."""

    def __init__(
        self,
        model: onnx.ModelProto,
        analysis: Analysis,
        kind: Kind,
        sizes: Mapping[str, Shape] | None = None,
    ) -> None:
        shapes = shapes_of(model, sizes or {})
        terms = list(work_terms(model, shapes) if kind == "macs" else stored_terms(model, kind))
        self.factors = [factor for factor, _ in terms]
        places: dict[Axis, int] = {}
        self.terms: list[list[int]] = []
        self.readers: list[list[int]] = []  # of each axis: the terms it stands in
        self.lengths: list[int] = []
        self.units: dict[int, list[tuple[int, int]]] = {}  # unit -> (axis, indices it has there)
        for k, (_, axes) in enumerate(terms):
            self.terms.append([])
            for axis in axes:
                if axis not in places:
                    places[axis] = len(self.lengths)
                    self.lengths.append(shapes[axis[0]][axis[1]])
                    self.readers.append([])
                    self.mark(analysis, axis, places[axis])
                self.terms[k].append(places[axis])
                self.readers[places[axis]].append(k)
        idle = {name + what for name in whole(model) for what in (MATRIX, PRODUCT, SHIFT)}
        self.waived: dict[int, float] = {}  # of terms: what they do not cost while it is this
        self.waived = {k: self.value(k, {}) for k, (_, axes) in enumerate(terms)
                       if idle & {tensor for tensor, _ in axes}}  # fmt: skip
        self.values = [self.value(k, {}) for k in range(len(terms))]
        self.total = float(sum(self.values))
        if self.total <= 0:
            raise BadInput(f"the {kind} of the model are not known", found="sizes not inferred")

    def mark(self, analysis: Analysis, axis: Axis, place: int) -> None:
        """Note how many indices of an axis each unit has."""
        labels = analysis.labels.get(axis[0])
        if labels is None or axis[1] >= len(labels):
            return
        units, counts = np.unique(labels[axis[1]], return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            if unit > 0:
                self.units.setdefault(unit, []).append((place, count))

    @property
    def now(self) -> float:
        return float(sum(self.values))

    def value(self, term: int, less: Mapping[int, int]) -> float:
        """A term's cost with some axes shortened."""
        product = self.factors[term]
        for place in self.terms[term]:
            product *= self.lengths[place] - less.get(place, 0)
        return 0.0 if product == self.waived.get(term) else product

    def shortened(self, units: Iterable[int]) -> dict[int, int]:
        """By how much each axis shrinks without the units."""
        less: dict[int, int] = {}
        for unit in units:
            for place, count in self.units.get(unit, ()):
                less[place] = less.get(place, 0) + count
        return less

    def touched(self, units: Iterable[int]) -> set[int]:
        """The terms that change when the units go."""
        return {t for unit in units for place, _ in self.units.get(unit, ())
                for t in self.readers[place]}  # fmt: skip

    def saving(self, units: list[int]) -> float:
        """What removing the units saves now."""
        less = self.shortened(units)
        terms = {t for place in less for t in self.readers[place]}
        return float(sum(self.values[t] - self.value(t, less) for t in terms))

    def remove(self, units: list[int]) -> None:
        """Take the units out."""
        less = self.shortened(units)
        for place, count in less.items():
            self.lengths[place] -= count
        for term in {t for place in less for t in self.readers[place]}:
            self.values[term] = self.value(term, {})


def stored_terms(model: onnx.ModelProto, kind: Kind) -> Iterable[tuple[float, list[Axis]]]:
    """Stored tensors: one term each."""
    for tensor in model.graph.initializer:
        item = 1.0
        if kind == "size_bytes":
            item = float(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
        yield item, [(tensor.name, axis) for axis in range(len(tensor.dims))]


def work_terms(
    model: onnx.ModelProto, shapes: Mapping[str, Shape]
) -> Iterable[tuple[float, list[Axis]]]:
    """Nodes with multiply-accumulates: one term each, recurrent ones two; nodes whose sizes are
    not known are left out."""

    def axes(name: str, start: int = 0) -> list[Axis]:
        return [(name, axis) for axis in range(start, len(shapes[name]))]

    for node in model.graph.node:
        if node.op_type not in WORK or node_macs(node, shapes.get) is None:
            continue
        if node.op_type in RECURRENT:
            x = axes(node.input[0])[:2]
            yield 1.0, x + axes(node.input[1])
            yield 1.0, x + axes(node.input[2])
        elif node.op_type == "Conv":
            yield 1.0, axes(node.output[0]) + axes(node.input[1], 1)
        elif node.op_type == "ConvTranspose":
            yield 1.0, axes(node.input[0]) + axes(node.input[1], 1)
        else:
            inner = 0 if transposed(node) else len(shapes[node.input[0]]) - 1
            yield 1.0, [*axes(node.output[0]), (node.input[0], inner)]
