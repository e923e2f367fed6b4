"""What an operator sees of its node."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from edgewright.errors import BadInput

Tensor = torch.Tensor
Value = Tensor | None  # None: an optional input that is left out
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Node:
    """One node: operator, tensor names ("" where left out), attributes, operator set version.

    Attributes are numbers, strings, lists of them, or torch tensors.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> BadInput:
        """The error for a use of an operator that is not covered."""
        return BadInput(
            f"node '{self.name}' ({self.op}) cannot be run in torch",
            found=what,
            hint="recover with least squares instead, which needs no gradients",
        )


Op = Callable[[Node, list[Value]], Result]


def ints(value: Tensor) -> list[int]:
    """A tensor of whole numbers as a list."""
    return [int(v) for v in value.detach().reshape(-1).tolist()]


def at(inputs: list[Value], k: int) -> Value:
    """The k-th input, None where it is left out."""
    return inputs[k] if k < len(inputs) else None


def need(inputs: list[Value], k: int) -> Tensor:
    """The k-th input, which the operator cannot do without."""
    value = inputs[k]
    assert value is not None
    return value


def int_list(node: Node, inputs: list[Value], k: int, name: str) -> list[int] | None:
    """Whole numbers from input `k` (newer operator sets) or from an attribute (older ones)."""
    value = at(inputs, k)
    if value is not None:
        return ints(value)
    stored = node.get(name)
    return None if stored is None else [int(v) for v in stored]
