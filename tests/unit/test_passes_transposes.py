"""A transpose wrapped in reshapes becomes one transpose; what only looks like it stays."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from edgewright.passes.shapes import infer
from edgewright.passes.transposes import unwrap_transposes
from edgewright.runtime.local import open_local


def built(joined: list[int], parted: list[int], perm: str, out: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,2,3,4] x) => (float[{out}] y) {{
          a = Reshape (x, j)
          b = Transpose <perm=[{perm}]> (a)
          c = Reshape (b, p)
          y = Relu (c)
        }}"""
    )
    for name, values in (("j", joined), ("p", parted)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    return model


def passed(model: onnx.ModelProto) -> tuple[int, onnx.ModelProto]:
    work = ir.from_proto(model)
    infer(work)
    count = unwrap_transposes(work)
    return count, ir.to_proto(work)


@pytest.mark.parametrize("first", [-1, 5])
def test_one_transpose_is_left(first):
    model = built([-1, 3, 4], [first, 2, 4, 3], "0,2,1", "M,2,4,3")
    count, result = passed(model)
    assert count == 1
    assert [n.op_type for n in result.graph.node] == ["Transpose", "Relu"]
    x = {"x": np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)}
    a, b = (open_local(m.SerializeToString()).run(x)[0] for m in (model, result))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("joined", "parted", "perm", "out"),
    [
        ([-1, 3, 4], [-1, 2, 4, 3], "0,1,2", "M,2,4,3"),  # nothing is transposed
        ([-1, 6, 4], [-1, 2, 4, 3], "0,2,1", "M,2,4,3"),  # joins rows with heads
        ([-1, 3, 4], [-1, 4, 4, 3], "0,2,1", "M,4,4,3"),  # parts into other heads
        ([-1, 3, 4], [-1, 2, 3, 4], "0,2,1", "M,2,3,4"),  # parts rows and columns anew
    ],
)
def test_what_only_looks_like_it_stays(joined, parted, perm, out):
    count, result = passed(built(joined, parted, perm, out))
    assert count == 0
    assert [n.op_type for n in result.graph.node] == ["Reshape", "Transpose", "Reshape", "Relu"]
