"""What `prune` and `recover` both do to a simplified model first, alike to the last name."""

import onnx

from edgewright.model import name_nodes
from edgewright.prune.outputs import opened
from edgewright.prune.untie import untie


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes the same: vectors untied, nodes named, streams behind outputs opened."""
    result = untie(model)
    name_nodes(result)
    return opened(result)
