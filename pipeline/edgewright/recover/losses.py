"""What a student is asked to match: outputs, inner features, attention; and how far off it is.

Outputs that end in a Softmax or a Sigmoid are compared by what goes into it: a probability fed
as a logit trains nothing useful. Other outputs are compared by their squared error over the
teacher's variance. Whether a matrix product at the end gives logits or values is not written in
a graph: it is compared as both, for both are smallest where student and teacher agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
import torch

from edgewright.errors import BadInput
from edgewright.model import opset
from edgewright.prune.outputs import MATRIX
from edgewright.recover.ops import Tensor

Kind = Literal["soft", "binary", "logits", "value"]
FLOOR = 1e-6  # probabilities below are taken as this where only probabilities are known
TINY = 1e-12


@dataclass(frozen=True)
class Target:
    """One output to match.

    kind: "soft" (a distribution over `axis`), "binary" (probabilities of their own), "value",
    or "logits" ("soft" and "value" added).
    tensor: what is compared, the output or what goes into its Softmax. probability: `tensor`
    holds probabilities, because what they were made from is out of reach.
    """

    output: str
    kind: Kind
    tensor: str
    axis: int = -1
    probability: bool = False

    def logits(self, value: Tensor) -> Tensor:
        if not self.probability:
            return value
        if float(value.detach().min()) < -FLOOR or float(value.detach().max()) > 1 + FLOOR:
            raise BadInput(
                f"student and teacher differ in what output '{self.output}' is",
                expected="probabilities on both sides",
                found="values outside of 0 to 1 on one side",
            )
        safe = value.clamp(FLOOR, 1 - FLOOR)
        return torch.logit(safe) if self.kind == "binary" else safe.log()


def find_target(model: onnx.ModelProto, output: str) -> Target:
    """How an output is to be matched, judged by the nodes that end in it."""
    makers = {o: n for n in model.graph.node for o in n.output}
    name = output
    while name in makers:
        node = makers[name]
        if node.op_type in ("Identity", "ArgMax"):
            name = node.input[0]
        elif node.op_type in ("Softmax", "LogSoftmax"):
            default = -1 if opset(model) >= 13 else 1
            axis = next((a.i for a in node.attribute if a.name == "axis"), default)
            return Target(output, "soft", node.input[0], axis)
        elif node.op_type == "Sigmoid":
            return Target(output, "binary", node.input[0])
        elif ends_in_product(model, makers, name):
            return Target(output, "logits", name)
        else:
            break
    return Target(output, "value", name)


def ends_in_product(
    model: onnx.ModelProto, makers: Mapping[str, onnx.NodeProto], name: str
) -> bool:
    """Whether a matrix product with stored weights, a bias perhaps added, makes the tensor.

    The one that `prune.outputs` gave an output does not count: what it gives is what it reads.
    """
    stored = {t.name for t in model.graph.initializer}
    node = makers[name]
    if node.op_type == "Add":
        free = [n for n in node.input if n not in stored]
        if len(free) != 1 or free[0] not in makers:
            return False
        node = makers[free[0]]
    own = node.op_type in ("Gemm", "MatMul") and node.input[1] in stored
    return own and not node.input[1].endswith(MATRIX)


def output_loss(
    target: Target, student: Tensor, teacher: Tensor, temperature: float, balanced: bool = False
) -> Tensor:
    """Distance of one output from the teacher's, 0 where they agree; see `Target.kind`.

    soft: KL(teacher || student) in nats, both softened by the temperature, times its square
    (Hinton et al., 1503.02531, section 2.1), mean over positions. binary: the same for each
    number on its own. value: mean squared error over the teacher's variance. logits: both.
    balanced: the mean over positions is that of `even`.
    """
    if target.kind == "logits":
        parts = (replace(target, kind="value"), replace(target, kind="soft"))
        both = [output_loss(p, student, teacher, temperature, balanced) for p in parts]
        return torch.stack(both).sum()
    if target.kind == "value":
        spread = (teacher - teacher.mean()).square().mean() + TINY
        return (student - teacher).square().mean() / spread
    s, t = student / temperature, teacher / temperature
    if target.kind == "binary":
        p = torch.sigmoid(t)
        gap = torch.nn.functional.logsigmoid(t) - torch.nn.functional.logsigmoid(s)
        rest = torch.nn.functional.logsigmoid(-t) - torch.nn.functional.logsigmoid(-s)
        return (p * gap + (1 - p) * rest).mean() * temperature**2
    log_p, log_q = torch.log_softmax(t, target.axis), torch.log_softmax(s, target.axis)
    found = (log_p.exp() * (log_p - log_q)).sum(target.axis) * temperature**2
    return (found * even(teacher.argmax(target.axis))).mean() if balanced else found.mean()


def even(answers: Tensor) -> Tensor:
    """Weights of answers, 1 in the mean: the most frequent one counts half where it is more.

    Where a background is most of what is answered (CTC's blank), a student that is not sure takes
    it, and what is rare is lost: read shorter, found less.
    """
    common = answers == torch.mode(answers.flatten()).values
    share = float(common.float().mean())
    if not 0.5 < share < 1:
        return torch.ones_like(answers, dtype=torch.float32)
    return torch.where(common, 0.5 / share, 0.5 / (1 - share))


def agreement(target: Target, student: Tensor, teacher: Tensor) -> float:
    """Share of equal decisions; for values 1 minus the relative squared error, at least 0."""
    if target.kind in ("soft", "logits") and student.shape[target.axis] > 1:
        equal = student.argmax(target.axis) == teacher.argmax(target.axis)
        return float(equal.float().mean())
    if target.kind == "binary":
        return float(((student > 0) == (teacher > 0)).float().mean())
    value = replace(target, kind="value")
    return max(0.0, 1 - float(output_loss(value, student, teacher, 1.0)))


def keep_rows(name: str, value: Tensor, kept: Mapping[tuple[str, int], np.ndarray]) -> Tensor:
    """The teacher's tensor without what pruning removed from it."""
    for axis in range(value.dim()):
        if (name, axis) in kept:
            value = value.index_select(axis, torch.from_numpy(np.asarray(kept[name, axis])).long())
    return value


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's variance."""
    spread = (teacher - teacher.mean()).square().mean() + TINY
    return (student - teacher).square().mean() / spread


def map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between attention maps, which a softmax over the last axis made."""
    p, q = teacher.clamp(min=FLOOR), student.clamp(min=FLOOR)
    return (p * (p.log() - q.log())).sum(-1).mean()


def spatial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer: where the energy over channels lies, whatever their number.

    Zagoruyko and Komodakis, 1612.03928, equation 2 with p = 2. Tensors (N, C, ...).
    """
    maps = []
    for value in (student, teacher):
        energy = value.square().mean(1).flatten(1)
        maps.append(torch.nn.functional.normalize(energy, dim=1))
    return (maps[0] - maps[1]).square().sum(1).mean()


def upstream(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """The nodes that `name` depends on, nearest first."""
    makers = {o: n for n in model.graph.node for o in n.output}
    found, queue, seen = [], [name], {name}
    while queue:
        node = makers.get(queue.pop(0))
        if node is None:
            continue
        found.append(node)
        for read in node.input:
            if read not in seen:
                seen.add(read)
                queue.append(read)
    return found


def last_feature(model: onnx.ModelProto, target: Target) -> str | None:
    """The tensor before the last pooling, else before the last product with stored weights.

    Before pooling it tells more per sample (MiR, 2204.02881).
    """
    stored = {t.name for t in model.graph.initializer}
    before = upstream(model, target.tensor)
    for node in before:
        if node.op_type in ("GlobalAveragePool", "ReduceMean") and node.input[0] not in stored:
            return node.input[0]
    for node in before:
        if node.op_type in ("Gemm", "MatMul", "Conv") and node.input[1] in stored:
            return node.input[0]
    return None


def attention_maps(model: onnx.ModelProto) -> list[str]:
    """Outputs of the Softmax nodes that weigh a MatMul."""
    weighing = {n.input[0] for n in model.graph.node if n.op_type == "MatMul"}
    nodes = [n for n in model.graph.node if n.op_type == "Softmax"]
    return [n.output[0] for n in nodes if n.output[0] in weighing]


def spatial_features(model: onnx.ModelProto, count: int = 4) -> list[str]:
    """Outputs of up to `count` dense convolutions, evenly spread over the depth."""
    found = []
    for node in model.graph.node:
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv" and group == 1:
            found.append(node.output[0])
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[k] for k in places]
