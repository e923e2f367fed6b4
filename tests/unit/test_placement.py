"""Placement: kinds of kernels, shares of the work, and the contract, from profiles by hand.

The profiles of CUDA and TensorRT are written in ONNX Runtime's own format; no GPU is needed.
"""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.gate.demands import target_demands
from edgewright.measure import kernels, placement
from edgewright.runtime import worker
from edgewright.runtime.providers import COMPILING
from edgewright.target import load_target
from edgewright.work import macs_by_name

SHARES = ("int8_share", "border_share", "float_share", "other_share")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


@pytest.mark.parametrize(
    ("op", "types", "expected"),
    [
        ("QLinearConv", ["uint8", "float", "uint8"], "int8"),
        ("MatMulIntegerToFloat", ["uint8", "int8", "float"], "int8"),
        ("ConvInteger", ["uint8", "int8"], "int8"),
        ("DynamicQuantizeMatMul", ["float", "int8"], "int8"),
        ("QGemm", ["uint8"], "int8"),
        ("MaxPool", ["uint8"], "int8"),
        ("Transpose", ["int8"], "int8"),
        ("MaxPool", ["float"], "float"),
        ("Conv", ["float", "float"], "float"),
        ("QuantizeLinear", ["float", "float", "uint8"], "border"),
        ("DequantizeLinear", ["uint8", "float"], "border"),
        ("DynamicQuantizeLinear", ["float"], "border"),
        ("Cast", ["uint8"], "other"),
        ("Gather", ["int64", "int64"], "other"),
        ("If", ["bool"], "other"),
        ("Loop", ["int64", "float"], "other"),
    ],
)
def test_kinds_of_kernels(op, types, expected):
    assert kernels.kind(op, types) == expected


def event(name, op, us, provider=CPU, types=("float",), macs=0):
    return {
        "name": name,
        "index": 0,
        "op": op,
        "provider": provider,
        "types": list(types),
        "us": us,
        "macs": macs,
    }


def test_node_times_leave_out_the_first_run():
    events = [event("a", "Conv", us) for us in (900, 10, 20)]
    events += [event("body", "Add", us) for us in (1, 1, 2, 3, 4, 5)]  # twice in each run
    events += [event("branch", "Mul", 6)]  # in one of the runs
    found = {n["name"]: n["us"] for n in placement.node_times(events, 3)}
    assert found == {"a": 15, "body": 7, "branch": 2}


def test_shares_are_of_kernel_time_without_containers():
    nodes = [
        event("if", "If", 100, types=["bool"]),
        event("conv", "QLinearConv", 60, types=["uint8"]),
        event("q", "QuantizeLinear", 10),
        event("tail", "Softmax", 30),
    ]
    report = placement.summarise(nodes, load_target("cpu"), 4)
    assert [report[key] for key in SHARES] == pytest.approx([0.6, 0.1, 0.3, 0.0])
    assert report["ok"] is True
    assert report["nodes_by_kind"] == {"border": 1, "float": 1, "int8": 1, "other": 1}
    assert report["float_nodes"] == [{"name": "tail", "op": "Softmax", "share": 0.3}]
    assert [o["op"] for o in report["operators"][:2]] == ["QLinearConv", "Softmax"]


def group(provider, *names, macs=0, int8_macs=0):
    nodes = [{"name": n, "op": "Conv"} for n in names]
    return {"provider": provider, "nodes": nodes, "macs": macs, "int8_macs": int8_macs}


def test_work_on_a_gpu_is_counted_in_multiply_accumulates():
    """A profile times the call that starts a kernel on a GPU, which may be the longer the less
    it computes; the stray's time here is nearly all, its work a tenth."""
    nodes = [
        event("a", "Conv", 10, CUDA, macs=900),
        event("b", "Conv", 990, macs=100),
        event("c", "Resize", 1),
    ]
    report = placement.summarise(nodes, load_target("gpu"), 3)
    assert report["provider_share"] == pytest.approx(0.9)
    assert report["share_of"] == "multiply-accumulates"
    assert report["required_share"] == 0.9
    assert report["ok"] is True
    assert [s["name"] for s in report["strays"]] == ["b", "c"], "the slowest first"
    assert report["strays"][0] == {"name": "b", "op": "Conv", "provider": CPU}
    nodes[1]["macs"] = 200
    report = placement.summarise(nodes, load_target("gpu"), 3)
    assert report["provider_share"] == pytest.approx(900 / 1100)
    assert report["ok"] is False


def test_work_on_the_cpu_is_time_and_under_emulation_it_is_not():
    target = load_target("cpu")
    target = replace(target, runtime=replace(target.runtime, provider="XnnpackExecutionProvider"))
    nodes = [
        event("a", "Conv", 30, "XnnpackExecutionProvider", macs=900),
        event("b", "Resize", 70, macs=100),
    ]
    report = placement.summarise(nodes, target, 2)
    assert (report["provider_share"], report["share_of"]) == (pytest.approx(0.3), "time")
    report = placement.summarise(nodes, target, 2, timed=False)
    assert report["provider_share"] == pytest.approx(0.9)
    assert report["share_of"] == "multiply-accumulates"


def test_compiled_nodes_count_by_what_was_assigned_to_them():
    compiled = event("TRTKernel_0", "TRTKernel_0", 10, TENSORRT)
    stray = event("b", "NonZero", 1)
    groups = [
        group(TENSORRT, "x", "y", macs=700, int8_macs=630),
        group(CPU, "b", macs=300),
    ]
    report = placement.summarise([compiled, stray], load_target("tensorrt"), 3, groups=groups)
    assert report["provider_share"] == pytest.approx(0.7)
    assert report["ok"] is False
    assert report["int8_work_share"] == pytest.approx(0.63)
    assert report["macs"] == 1000
    assert report["assigned"] == {
        CPU: {"nodes": 1, "groups": 1},
        TENSORRT: {"nodes": 2, "groups": 1},
    }
    assert report["int8_share"] is None, "of the time inside a compiled node nothing is known"
    assert "compiles" in report["share_reason"]


def test_a_runtime_that_tells_no_assignment_counts_nodes_of_the_file():
    compiled = event("TRTKernel_0", "TRTKernel_0", 10, TENSORRT)
    stray = event("b", "NonZero", 1)
    report = placement.summarise([compiled, stray], load_target("tensorrt"), 100)
    assert report["provider_share"] == pytest.approx(0.99)
    assert report["share_of"] == "nodes"
    assert report["int8_work_share"] is None
    assert "does not tell its assignment" in report["int8_work_reason"]


@pytest.mark.parametrize("name", ["gpu", "tensorrt", "openvino"])
def test_a_provider_that_takes_nothing_has_no_share(name):
    for groups in (None, [group(CPU, "b", macs=5)]):
        report = placement.summarise([event("b", "Conv", 1, macs=5)], load_target(name), 1)
        assert report["provider_share"] == 0
        assert report["ok"] is False
        assert groups or report["strays"][0]["name"] == "b"


def test_a_session_that_forbids_the_cpu_bears_no_stray():
    target = load_target("gpu")
    session = {**target.runtime.session, placement.NO_FALLBACK: "1"}
    strict = replace(target, runtime=replace(target.runtime, session=session))
    nodes = [event("a", "Conv", 10, CUDA, macs=999), event("b", "Shape", 1)]
    assert placement.summarise(nodes, target, 2)["ok"] is True
    report = placement.summarise(nodes, strict, 2)
    assert report["ok"] is False
    assert report["required_share"] == 1.0
    assert placement.summarise(nodes[:1], strict, 2)["ok"] is True


def test_a_profile_without_nodes_is_no_success():
    report = placement.summarise([], load_target("cpu"), 5)
    assert report["ok"] is False
    assert report["provider_share"] == 0
    assert not math.isnan(report["provider_share"])


# Work of kernels


@pytest.mark.parametrize(
    ("op", "shapes", "elements", "weights", "expected"),
    [
        # 8 x 10 x 10 outputs, each of 4 channels by 3 by 3
        ("Conv", [[1, 4, 12, 12]], 800, [None, (8, 4, 3, 3)], 800 * 36),
        ("QLinearConv", [[1, 12, 12, 4]], 800, [None] * 3 + [(8, 4, 3, 3)], 800 * 36),
        ("Conv", [[1, 8, 12, 12]], 800, [None, (8, 1, 3, 3)], 800 * 9),  # depthwise
        ("ConvTranspose", [[1, 4, 5, 5]], 999, [None, (4, 2, 3, 3)], 100 * 18),
        ("MatMul", [[2, 6, 7], [7, 5]], 60, [], 60 * 7),
        ("DynamicQuantizeMatMul", [[6, 7]], 30, [None, (7, 5)], 210),
        ("Gemm", [[6, 7]], 30, [None, (5, 7)], 210),
        ("QGemm", [[7, 6]], 30, [None, None, None, (7, 5)], 210),
        ("LSTM", [[9, 1, 3]], 99, [None, (1, 8, 3), (1, 8, 2)], 9 * (24 + 16)),
        ("Conv", [[1, 4, 12, 12]], 800, [], None),
        ("Softmax", [[1, 4]], 4, [], 0),
    ],
)
def test_work_of_a_kernel(op, shapes, elements, weights, expected):
    node = {"op": op, "shapes": shapes, "elements": elements}
    assert kernels.kernel_macs(node, weights) == expected


def qdq_model() -> onnx.ModelProto:
    """A MatMul in int8 form (12 x 8), then one in float (8 x 4)."""
    names = ["s", "z", "zs", "q", "f"]
    values = [np.float32(0.1), np.uint8(0), np.int8(0), np.ones((12, 8), np.int8)]
    values.append(np.ones((8, 4), np.float32))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "quantize"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "dequantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "zs"], ["w"], "weight"),
        helper.make_node("MatMul", ["xd", "w"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "f"], ["y"], "second"),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", width])
        for n, width in (("x", 12), ("y", 4))
    ]
    tensors = [numpy_helper.from_array(v, n) for n, v in zip(names, values, strict=True)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_work_of_a_group_is_that_of_its_nodes_in_the_file():
    model = qdq_model()
    macs = macs_by_name(model, {"x": (3, 12)})
    assert macs == {"first": 3 * 12 * 8, "second": 3 * 8 * 4}
    int8 = {node.name for node in kernels.int8_nodes(model)}
    assert int8 == {"first"}
    groups = [group(TENSORRT, "first"), group(CPU, "second/MatMulAddFusion")]
    groups[0]["nodes"].append({"name": "quantize", "op": "QuantizeLinear"})
    found = placement.with_macs(groups, macs, int8)
    assert [(g["macs"], g["int8_macs"]) for g in found] == [(288, 288), (96, 0)]
    nameless = placement.with_macs([group(TENSORRT, "")], macs, set())
    assert nameless[0]["macs"] is None, "no guess"
    report = placement.summarise(
        [event("k", "k", 9, TENSORRT)], load_target("tensorrt"), 1, groups=nameless
    )
    assert report["int8_work_share"] is None
    assert "names" in report["int8_work_reason"]


# A profile as ONNX Runtime writes it


def recorded(name, provider, op, us, inputs, outputs, index=0):
    args = {
        "thread_scheduling_stats": "",
        "input_type_shape": inputs,
        "output_type_shape": outputs,
        "output_size": "4",
        "parameter_size": "0",
        "activation_size": "4",
        "node_index": str(index),
        "provider": provider,
        "op_name": op,
    }
    head = {"cat": "Node", "pid": 7, "tid": 7, "ts": 5, "ph": "X"}
    return {**head, "dur": us, "name": f"{name}_kernel_time", "args": args}


def test_a_recorded_profile_of_cuda():
    """Two runs of a Conv on the GPU, copies around it, and a Resize that fell back to the CPU."""
    run = [
        recorded("Memcpy", CUDA, "MemcpyFromHost", 9, [{"float": [1, 4, 12, 12]}], []),
        recorded(
            "conv",
            CUDA,
            "Conv",
            40,
            [{"float": [1, 4, 12, 12]}, {"float": [8, 4, 3, 3]}],
            [{"float": [1, 8, 10, 10]}],
            1,
        ),
        recorded("resize", CPU, "Resize", 400, [{"float": [1, 8, 10, 10]}], [{"float": [1, 8]}], 2),
    ]
    noise = {"cat": "Session", "name": "model_run", "dur": 500, "args": {}}
    fence = {"cat": "Node", "name": "conv_fence_before", "dur": 1, "args": {"op_name": "Conv"}}
    events = json.loads(json.dumps([noise, *run, fence, *run]))
    nodes = placement.node_times(worker.kernels(events), 2)
    assert [(n["name"], n["us"]) for n in nodes] == [("Memcpy", 9), ("conv", 40), ("resize", 400)]
    weights = {"conv": [None, (8, 4, 3, 3)]}
    for node in nodes:
        node["macs"] = kernels.kernel_macs(node, weights.get(node["name"], []))
    report = placement.summarise(nodes, load_target("gpu"), 2)
    assert report["nodes"] == {CPU: 1, CUDA: 2}
    assert report["macs"] == 800 * 36
    assert report["provider_share"] == 1.0
    assert report["share_of"] == "multiply-accumulates"
    assert [s["name"] for s in report["strays"]] == ["resize"]


def test_a_recorded_profile_of_tensorrt():
    kernel = "TRTKernel_graph_main_123_0_0"
    events = [
        recorded(kernel, TENSORRT, kernel, us, [{"float": [1, 12]}], [{"float": [1, 4]}])
        for us in (90000, 40)
    ]
    nodes = placement.node_times(worker.kernels(events), 2)
    for node in nodes:
        node["macs"] = kernels.kernel_macs(node, [])
    groups = [group(TENSORRT, "first", "second", macs=384, int8_macs=288)]
    report = placement.summarise(nodes, load_target("tensorrt"), 5, groups=groups)
    assert report["nodes_by_kind"] == {"compiled": 1}
    assert report["provider_share"] == 1.0
    assert report["ok"] is True
    assert report["int8_work_share"] == pytest.approx(0.75)
    assert TENSORRT in COMPILING


# The contract in the gate


def demand(**placed):
    report = {"provider": CUDA, "provider_share": 1.0, "required_share": 0.9, "ok": True, **placed}
    return {c["name"]: c for c in target_demands({"placement": report})}


def test_a_fallback_fails_with_the_names_of_the_nodes():
    strays = [{"name": f"n{k}", "op": "Resize", "provider": CPU} for k in range(12)]
    found = demand(provider_share=0.4, ok=False, share_of="time", strays=strays)
    check = found["min_provider_share"]
    assert check["verdict"] == "FAIL"
    assert check["reason"].startswith("only 40.0% of the work (time) on CUDAExecutionProvider")
    assert "n0 (Resize on CPUExecutionProvider)" in check["reason"]
    assert check["reason"].endswith("and 2 more")


def test_a_profile_that_demands_no_int8_has_no_check_for_it():
    assert list(demand(int8_work_share=0.0)) == ["runs", "min_provider_share"]


@pytest.mark.parametrize(
    ("share", "verdict", "word"),
    [
        (0.95, "PASS", "95.0%"),
        (0.9, "PASS", "90.0%"),
        (0.5, "FAIL", "in float: head"),
        (None, "INCONCLUSIVE", "not known"),
        (math.nan, "INCONCLUSIVE", "not known"),
    ],
)
def test_the_share_of_int8_is_held_to_the_profile(share, verdict, word):
    check = demand(
        int8_work_share=share,
        int8_work_reason="the sizes are not known",
        required_int8_share=0.9,
        float_nodes=[{"name": "head", "op": "Gemm", "share": None}],
    )["min_int8_share"]
    assert check["verdict"] == verdict
    assert word in check["reason"]
