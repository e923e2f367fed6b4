"""Admission of untrusted ONNX files: each threat builds its own file and is refused by name."""

import os
import platform
import socket
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.admit import admit, trial
from edgewright.errors import EdgewrightError

FLOAT = TensorProto.FLOAT
Edit = Callable[[onnx.ModelProto], object]


def make(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    domains: dict[str, int] | None = None,
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model x (1, 4) -> y (1, 4) unless told otherwise."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        list(inputs or [helper.make_tensor_value_info("x", FLOAT, [1, 4])]),
        list(outputs or [helper.make_tensor_value_info("y", FLOAT, [1, 4])]),
        [numpy_helper.from_array(v, k) for k, v in (weights or {}).items()],
    )
    imports = [helper.make_opsetid(d, v) for d, v in {"": opset, **(domains or {})}.items()]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions))
    model.ir_version = 10
    return model


def dense(weight: np.ndarray | None = None) -> onnx.ModelProto:
    """y = x @ w."""
    weight = np.eye(4, dtype=np.float32) if weight is None else weight
    return make([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": weight})


def node(op: str, reads: str, writes: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, reads.split(), writes.split(), **attributes)


def refusal(
    tmp_path: Path, model: onnx.ModelProto | bytes, *, name: str = "model.onnx", **options: object
) -> str:
    """Write the model, admit it, and return the message after checking its form."""
    source = tmp_path / name
    source.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return refused(source, tmp_path, **options)


def refused(source: Path, tmp_path: Path, **options: object) -> str:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(EdgewrightError) as caught:
        admit(source, folder / "model.onnx", **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message and message.isprintable() and len(message) < 1000
    assert str(source) in message
    assert list(folder.iterdir()) == []  # nothing written, nothing left behind
    return message


def accepted(tmp_path: Path, model: onnx.ModelProto, **options: object) -> tuple[dict, Path]:
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    out = tmp_path / "out.onnx"
    return admit(tmp_path / "model.onnx", out, **options), out  # type: ignore[arg-type]


def notes(report: dict) -> str:
    return " | ".join(f"{n['level']}: {n['text']}" for n in report["notes"])


# --- files that are no model ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML"),
        (b"PK\x03\x04rest of a checkpoint", "PyTorch checkpoint"),
        (b"\x80\x02}q\x00.", "pickles are never loaded"),
        (bytes(range(7, 256)), "cannot be parsed"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph nodes"),
    ],
)
def test_strange_files(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refusal(tmp_path, data)


def test_truncated(tmp_path: Path) -> None:
    data = dense(np.ones((4, 400), np.float32)[:, :4].copy()).SerializeToString()
    assert "truncated" in refusal(tmp_path, data[: len(data) // 2])


def test_missing_folder_and_fifo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not found" in refused(tmp_path / "none.onnx", tmp_path)
    (tmp_path / "out").rmdir()
    monkeypatch.chdir(tmp_path)
    Path("e").mkdir()  # a name that is part of any message
    assert "model e;" in refused(Path("e"), tmp_path)
    (tmp_path / "out").rmdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "FIFO" in refused(tmp_path / "pipe.onnx", tmp_path)


def test_larger_than_two_gib(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    with source.open("wb") as file:
        file.truncate((1 << 31) + 1)  # sparse: takes no room
    assert "at most 2 GiB" in refused(source, tmp_path)


def test_links_to_the_model_itself_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_bytes(dense().SerializeToString())
    (tmp_path / "soft.onnx").symlink_to(tmp_path / "real.onnx")
    (tmp_path / "hard.onnx").hardlink_to(tmp_path / "real.onnx")
    for name in ("soft.onnx", "hard.onnx"):
        assert admit(tmp_path / name, tmp_path / "out.onnx")["opset"] == 17


# --- versions, names, sizes -------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 99])
def test_ir_version(tmp_path: Path, version: int) -> None:
    model = dense()
    model.ir_version = version
    message = refusal(tmp_path, model)
    assert f"unsupported ir_version {version}" in message and str(onnx.IR_VERSION) in message


def test_opset_unknown_to_onnx(tmp_path: Path) -> None:
    message = refusal(tmp_path, make([node("Relu", "x", "y")], opset=99))
    assert "opset 99" in message and str(onnx.defs.onnx_opset_version()) in message


@pytest.mark.parametrize(
    ("newer", "what"),
    [
        ({"opset": onnx.defs.onnx_opset_version()}, "opset"),
        ({"ir_version": onnx.IR_VERSION}, "ir_version"),
    ],
)
def test_version_unknown_to_the_runtime(tmp_path: Path, newer: dict[str, int], what: str) -> None:
    """onnx is often ahead of onnxruntime; where it is not, the file is let in."""
    model = make([node("Relu", "x", "y")], opset=newer.get("opset", 17))
    model.ir_version = newer.get("ir_version", 10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    try:
        admit(tmp_path / "model.onnx", tmp_path / "out.onnx")
    except EdgewrightError as error:
        assert error.exit_code == 3
        assert f"a newer {what} than the installed onnxruntime supports" in str(error)
        assert "or lower" in str(error)


def test_two_versions_of_one_operator_set(tmp_path: Path) -> None:
    model = dense()
    model.opset_import.append(helper.make_opsetid("ai.onnx", 13))
    assert "two versions" in refusal(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "words"), [("a\0b", "control characters"), ("n" * 5000, "too long")]
)
def test_names(tmp_path: Path, name: str, words: str) -> None:
    assert words in refusal(tmp_path, make([helper.make_node("Relu", ["x"], ["y"], name=name)]))


def test_name_that_is_no_utf8(tmp_path: Path) -> None:
    model = make([helper.make_node("Relu", ["x"], ["y"], name="abcdef")])
    data = model.SerializeToString().replace(b"abcdef", b"ab\xff\xfeef")
    assert "UTF-8" in refusal(tmp_path, data)


def test_names_like_paths_and_markup_are_only_names(tmp_path: Path) -> None:
    evil = "../../<script>'\"; rm -rf"
    model = make([node("Relu", "x", "t"), helper.make_node("Relu", ["t"], [evil], name=evil)])
    model.graph.output[0].name = evil
    report, out = accepted(tmp_path, model)
    assert report["opset"] == 17
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "out.onnx"}
    assert onnx.load(out).graph.output[0].name == evil


def test_metadata_bomb(tmp_path: Path) -> None:
    model = dense()
    helper.set_model_props(model, {"k": "x" * (17 << 20)})
    assert "at most 16 MiB" in refusal(tmp_path, model)


def test_debug_text_goes_metadata_of_the_model_stays(tmp_path: Path) -> None:
    model = dense()
    helper.set_model_props(model, {"classes": "a,b"})
    model.graph.node[0].doc_string = "File /home/me/train.py"
    model.graph.node[0].metadata_props.add(key="stack", value="File /home/me/train.py")
    report, out = accepted(tmp_path, model)
    assert b"/home/me" not in out.read_bytes()
    assert onnx.load(out).metadata_props[0].value == "a,b"
    assert "were removed" in notes(report)


def test_too_many_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewright.admit.MAX_NODES", 2)
    model = make([node("Relu", "x", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")])
    assert "too many nodes" in refusal(tmp_path, model)


def test_long_chain_is_admitted(tmp_path: Path) -> None:
    count = 20_000
    names = ["x", *(f"t{k}" for k in range(count - 1)), "y"]
    model = make([node("Relu", a, b) for a, b in pairwise(names)])
    assert accepted(tmp_path, model)[0]["opset"] == 17


# --- operators --------------------------------------------------------------------------------


def test_unknown_operator(tmp_path: Path) -> None:
    message = refusal(tmp_path, make([helper.make_node("Rellu", ["x"], ["y"], name="act")]))
    assert "unknown operator 'Rellu'" in message and "'act'" in message
    assert "did you mean 'Relu'?" in message


def test_operator_of_a_later_opset(tmp_path: Path) -> None:
    message = refusal(tmp_path, make([node("Gelu", "x", "y")]))
    assert "unknown operator 'Gelu'" in message and "opset 20" in message


def test_custom_operator(tmp_path: Path) -> None:
    model = make(
        [helper.make_node("Foo", ["x"], ["y"], name="mine", domain="my.ops")], domains={"my.ops": 1}
    )
    message = refusal(tmp_path, model)
    assert "my.ops:Foo" in message and "'mine'" in message and "custom" in message


def test_domain_without_import(tmp_path: Path) -> None:
    model = make([helper.make_node("Relu", ["x"], ["y"], domain="my.ops")])
    assert "opset import of 'my.ops'" in refusal(tmp_path, model)


def test_operators_built_into_the_runtime_are_admitted_and_noted(tmp_path: Path) -> None:
    model = make(
        [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")],
        domains={"com.microsoft": 1},
    )
    assert "1 nodes use operators of com.microsoft" in notes(accepted(tmp_path, model)[0])


# --- wiring -----------------------------------------------------------------------------------


def test_cycle(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
        helper.make_node("Relu", ["b"], ["y"], name="third"),
    ]
    message = refusal(tmp_path, make(nodes))
    assert "cycle: 'first' -> 'second' -> 'first'" in message


def test_dangling_input(tmp_path: Path) -> None:
    message = refusal(tmp_path, make([helper.make_node("Add", ["x", "gone"], ["y"], name="sum")]))
    assert "'sum' ('Add') reads 'gone', which nothing writes" in message


def test_output_that_nothing_writes(tmp_path: Path) -> None:
    assert "output 'y' is written by no node" in refusal(tmp_path, make([node("Relu", "x", "z")]))


def test_double_output(tmp_path: Path) -> None:
    model = make([node("Relu", "x", "y"), helper.make_node("Neg", ["x"], ["y"], name="again")])
    message = refusal(tmp_path, model)
    assert "'y' is written twice" in message and "'again'" in message


def test_output_listed_twice(tmp_path: Path) -> None:
    model = dense()
    model.graph.output.append(model.graph.output[0])
    assert "output 'y' is listed twice" in refusal(tmp_path, model)


def test_unsorted_nodes_are_sorted_and_noted(tmp_path: Path) -> None:
    model = make([node("Neg", "b", "y"), node("Exp", "a", "b"), node("Relu", "x", "a")])
    report, out = accepted(tmp_path, model)
    assert [n.op_type for n in onnx.load(out).graph.node] == ["Relu", "Exp", "Neg"]
    assert "have been sorted" in notes(report)


def test_nested_graphs_are_checked(tmp_path: Path) -> None:
    yes = helper.make_graph(
        [helper.make_node("Add", ["x", "gone"], ["t"], name="inner")],
        "yes",
        [],
        [helper.make_tensor_value_info("t", FLOAT, [1, 4])],
    )
    no = helper.make_graph(
        [node("Neg", "x", "e")], "no", [], [helper.make_tensor_value_info("e", FLOAT, [1, 4])]
    )
    model = make([node("If", "c", "y", then_branch=yes, else_branch=no)], {"c": np.array(True)})
    assert "'gone', which nothing writes" in refusal(tmp_path, model)
    yes.node[0].input[1] = "x"
    (tmp_path / "out").rmdir()
    model = make([node("If", "c", "y", then_branch=yes, else_branch=no)], {"c": np.array(True)})
    assert accepted(tmp_path, model)[0]["notes"] == []


def test_deep_nesting_is_admitted(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node("Relu", "x", "y0")], "g0", [], [value("y0", FLOAT, [1, 4])])
    for k in range(1, 20):
        other = helper.make_graph(
            [node("Neg", "x", f"n{k}")], f"e{k}", [], [value(f"n{k}", FLOAT, [1, 4])]
        )
        inner = node("If", "c", f"y{k}", then_branch=graph, else_branch=other)
        graph = helper.make_graph([inner], f"g{k}", [], [value(f"y{k}", FLOAT, [1, 4])])
    model = make(list(graph.node), {"c": np.array(True)}, outputs=[value("y19", FLOAT, [1, 4])])
    assert accepted(tmp_path, model)[0]["opset"] == 17


def test_declared_rank_contradicts_the_graph(tmp_path: Path) -> None:
    model = make([node("Relu", "x", "y")], outputs=[helper.make_tensor_value_info("y", FLOAT, [4])])
    message = refusal(tmp_path, model)
    assert "checker" in message and "rank" in message


def test_wrong_intermediate_shapes_are_dropped_and_noted(tmp_path: Path) -> None:
    model = make([node("Relu", "x", "t"), node("Neg", "t", "y")])
    model.graph.value_info.append(helper.make_tensor_value_info("t", FLOAT, [7, 7, 7]))
    report, out = accepted(tmp_path, model)
    assert "warning: stored intermediate shapes" in notes(report)
    assert not onnx.load(out).graph.value_info


# --- interface --------------------------------------------------------------------------------


def test_string_input(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("x", TensorProto.STRING, [1])
    model = make(
        [node("Identity", "x", "y")],
        inputs=[text],
        outputs=[helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    message = refusal(tmp_path, model)
    assert "input 'x'" in message and "STRING" in message


def test_sequence_output(tmp_path: Path) -> None:
    value = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    message = refusal(tmp_path, make([node("SequenceConstruct", "x", "y")], outputs=[value]))
    assert "output 'y'" in message and "sequence" in message


def test_no_outputs_and_no_inputs(tmp_path: Path) -> None:
    model = dense()
    model.graph.ClearField("output")
    assert "no outputs" in refusal(tmp_path, model)
    (tmp_path / "out").rmdir()
    model = make([node("Relu", "w", "y")], {"w": np.ones((1, 4), np.float32)})
    model.graph.ClearField("input")
    assert "no inputs" in refusal(tmp_path, model)


def test_input_without_shape(tmp_path: Path) -> None:
    model = make([node("Relu", "x", "y")], inputs=[helper.make_tensor_value_info("x", FLOAT, None)])
    assert "'x' has no shape" in refusal(tmp_path, model)


# --- stored tensors ---------------------------------------------------------------------------


def tensor_of(edit: Edit) -> onnx.ModelProto:
    model = dense()
    edit(model.graph.initializer[0])  # type: ignore[arg-type]
    return model


def resize(tensor: onnx.TensorProto, dims: list[int]) -> None:
    del tensor.dims[:]
    tensor.dims.extend(dims)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: resize(t, [1 << 31, 1 << 31]), f"expected {1 << 64} bytes"),
        (lambda t: resize(t, [-4, 4]), "found dims [-4, 4]"),
        (lambda t: setattr(t, "raw_data", t.raw_data[:-4]), "expected 64 bytes"),
        (lambda t: setattr(t, "data_type", 77), "unknown data type 77"),
        (lambda t: t.ClearField("raw_data"), "expected 16 values"),
        (lambda t: t.segment.SetInParent(), "segments"),
    ],
)
def test_tensor_data(tmp_path: Path, edit: Edit, words: str) -> None:
    message = refusal(tmp_path, tensor_of(edit))
    assert "initializer 'w'" in message and words in message


def test_tensor_in_a_constant_is_checked_too(tmp_path: Path) -> None:
    value = helper.make_tensor("v", FLOAT, [1, 4], [1.0, 2.0, 3.0, 4.0])
    resize(value, [1000, 4])
    message = refusal(
        tmp_path, make([node("Constant", "", "c", value=value), node("Add", "x c", "y")])
    )
    assert "attribute 'value' of node 'c'" in message and "expected 4000 values" in message


def test_sparse_initializer(tmp_path: Path) -> None:
    model = dense()
    values = helper.make_tensor("s", FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [16]))
    assert "sparse initializer 's'" in refusal(tmp_path, model)


def broken(value: float, shape: tuple[int, ...] = (4, 4)) -> np.ndarray:
    array = np.ones(shape, np.float32)
    array.flat[0] = value
    return array


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weight(tmp_path: Path, value: float) -> None:
    message = refusal(tmp_path, dense(broken(value)))
    assert "initializer 'w'" in message and "1 " in message and "of 16 values" in message
    assert ("NaN" if np.isnan(value) else "Inf") in message


def test_nonfinite_weight_behind_a_transpose(tmp_path: Path) -> None:
    nodes = [node("Transpose", "w", "t"), helper.make_node("MatMul", ["x", "t"], ["y"], name="fc")]
    message = refusal(tmp_path, make(nodes, {"w": broken(np.inf)}))
    assert "an operand of MatMul 'fc'" in message


def test_nan_in_a_constant_node(tmp_path: Path) -> None:
    value = numpy_helper.from_array(broken(np.nan, (1, 4)), "v")
    nodes = [node("Constant", "", "c", value=value), node("Add", "x c", "y")]
    assert "constant 'c'" in refusal(tmp_path, make(nodes))


def test_nan_in_an_attribute(tmp_path: Path) -> None:
    message = refusal(tmp_path, make([node("LeakyRelu", "x", "y", alpha=float("nan"))]))
    assert "'alpha'" in message and "NaN" in message


def test_nonfinite_in_float16(tmp_path: Path) -> None:
    nodes = [node("Cast", "w", "f", to=FLOAT), node("MatMul", "x f", "y")]
    model = make(nodes, {"w": broken(np.inf).astype(np.float16)})
    assert "Inf" in refusal(tmp_path, model)


def test_infinite_mask_is_only_noted(tmp_path: Path) -> None:
    mask = np.triu(np.full((1, 4), -np.inf, np.float32), 1)
    report, _ = accepted(tmp_path, make([node("Add", "x m", "y")], {"m": mask}))
    assert "info: initializer 'm' holds 3 Inf of 4 values" in notes(report)


def test_nonfinite_on_request(tmp_path: Path) -> None:
    report, _ = accepted(tmp_path, dense(broken(np.nan)), allow_nonfinite=True)
    assert "warning: initializer 'w' holds 1 NaN of 16 values" in notes(report)


# --- external data ----------------------------------------------------------------------------


def external(location: str = "data.bin", **fields: str) -> onnx.ModelProto:
    """`dense` with its weight in an external file."""
    model = dense()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **fields}.items():
        tensor.external_data.add(key=key, value=value)
    return model


PAYLOAD = np.eye(4, dtype=np.float32).tobytes()


def test_external_data_is_inlined(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(b"12345678" + PAYLOAD + b"rest")
    report, out = accepted(tmp_path, external("./sub/data.bin", offset="8", length="64"))
    assert [f["location"] for f in report["external_files"]] == ["sub/data.bin"]
    assert report["external_files"][0]["bytes"] == 76
    tensor = onnx.load(out, load_external_data=False).graph.initializer[0]
    assert tensor.raw_data == PAYLOAD and tensor.data_location == TensorProto.DEFAULT
    assert not tensor.external_data


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../secret", "'..'"),
        ("junk/../../secret", "'..'"),
        ("..\\secret", "'..'"),
        ("/etc/passwd", "absolute"),
        ("/proc/self/environ", "absolute"),
        ("C:\\secret", "absolute"),
        ("a\\b", "backslash"),
        (".", "a folder"),
        ("", "no location"),
        ("da\0ta", "control character"),
        ("*/_ORT_MEM_ADDR_/*", "missing"),
        ("none.bin", "missing"),
    ],
)
def test_external_location(tmp_path: Path, location: str, words: str) -> None:
    (tmp_path / "secret").write_bytes(PAYLOAD)
    message = refusal(tmp_path, external(location))
    assert words in message and "initializer 'w'" in message


def test_external_links(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    real.mkdir()
    (real / "data.bin").write_bytes(PAYLOAD)
    home = tmp_path / "home"
    home.mkdir()
    (home / "soft.bin").symlink_to(real / "data.bin")
    (home / "dir").symlink_to(real)
    (home / "hard.bin").hardlink_to(real / "data.bin")
    os.mkfifo(home / "pipe.bin")
    (home / "folder.bin").mkdir()
    (home / "plain.bin").write_bytes(PAYLOAD)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(home / "s.bin"))
    server.close()
    cases = {
        "soft.bin": "symbolic link",
        "dir/data.bin": "symbolic link",
        "hard.bin": "hard link (the file has 2 names)",
        "pipe.bin": "FIFO",
        "s.bin": "FIFO, socket or device",
        "folder.bin": "a folder",
        "plain.bin/data.bin": "a file where a folder should be",
    }
    for location, words in cases.items():
        source = home / "model.onnx"
        source.write_bytes(external(location).SerializeToString())
        message = refused(source, tmp_path)
        assert words in message and location in message
        (tmp_path / "out").rmdir()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"offset": "-1"}, "offset"),
        ({"length": "-64"}, "length"),
        ({"offset": "1_0"}, "offset"),
        ({"offset": "8"}, "past the end"),
        ({"offset": str(1 << 62)}, "past the end"),
        ({"length": str(1 << 50)}, "expected 64 bytes"),
        ({"length": "60"}, "expected 64 bytes"),
        ({"__class__": "x"}, "key '__class__'"),
        ({"basepath": "/etc"}, "key 'basepath'"),
        ({"checksum": "00"}, "SHA-1"),
    ],
)
def test_external_fields(tmp_path: Path, fields: dict[str, str], words: str) -> None:
    (tmp_path / "data.bin").write_bytes(PAYLOAD)
    message = refusal(tmp_path, external(**fields))
    assert words in message and "initializer 'w'" in message


def test_external_key_twice(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(PAYLOAD)
    model = external()
    model.graph.initializer[0].external_data.add(key="location", value="data.bin")
    assert "at most once" in refusal(tmp_path, model)


def test_external_amplification(tmp_path: Path) -> None:
    """Many tensors over one region of one file add up to more than a file can hold."""
    (tmp_path / "data.bin").write_bytes(bytes(1 << 24))
    model = external()
    first = model.graph.initializer[0]
    resize(first, [1 << 22])
    for k in range(130):
        copy = model.graph.initializer.add()
        copy.CopyFrom(first)
        copy.name = f"w{k}"
    assert "at most 2 GiB" in refusal(tmp_path, model)


def test_external_data_of_a_constant_in_a_branch(tmp_path: Path) -> None:
    tensor = external("../x").graph.initializer[0]
    branch = helper.make_graph(
        [node("Constant", "", "t", value=tensor)],
        "yes",
        [],
        [helper.make_tensor_value_info("t", FLOAT, [4, 4])],
    )
    model = make(
        [node("If", "c", "y", then_branch=branch, else_branch=branch)], {"c": np.array(True)}
    )
    assert "'..'" in refusal(tmp_path, model)


# --- functions --------------------------------------------------------------------------------


def function(name: str, nodes: Sequence[onnx.NodeProto]) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], list(nodes), imports)


def call(name: str, reads: str, writes: str) -> onnx.NodeProto:
    return helper.make_node(name, [reads], [writes], domain="local")


def test_functions_are_unfolded(tmp_path: Path) -> None:
    inner = function("Inner", [node("Relu", "a", "b")])
    outer = function("Outer", [call("Inner", "a", "t"), node("Neg", "t", "b")])
    model = make([call("Outer", "x", "y")], domains={"local": 1}, functions=[inner, outer])
    report, out = accepted(tmp_path, model)
    assert [n.op_type for n in onnx.load(out).graph.node] == ["Relu", "Neg"]
    assert "2 model-local functions were unfolded" in notes(report)


def test_recursive_function(tmp_path: Path) -> None:
    loop = function("Loop1", [call("Loop2", "a", "b")])
    back = function("Loop2", [call("Loop1", "a", "b")])
    model = make([call("Loop1", "x", "y")], domains={"local": 1}, functions=[loop, back])
    assert "calls itself" in refusal(tmp_path, model)


def test_function_bomb(tmp_path: Path) -> None:
    """Ten levels of ten calls each: ten thousand million nodes."""
    functions = [function("F0", [node("Relu", "a", "b")])]
    for level in range(1, 11):
        names = ["a", *(f"t{k}" for k in range(9)), "b"]
        calls = [call(f"F{level - 1}", a, b) for a, b in pairwise(names)]
        functions.append(function(f"F{level}", calls))
    model = make([call("F10", "x", "y")], domains={"local": 1}, functions=functions)
    assert "unfold to too many nodes" in refusal(tmp_path, model)


# --- trial runs -------------------------------------------------------------------------------


def test_runtime_refuses_at_load(tmp_path: Path) -> None:
    """int8 Exp: in the schema's types it is not, so the checker or the runtime says so."""
    model = make(
        [node("Exp", "x", "y")],
        inputs=[helper.make_tensor_value_info("x", TensorProto.INT8, [1, 4])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.INT8, [1, 4])],
    )
    assert "int8" in refusal(tmp_path, model)


def endless() -> onnx.ModelProto:
    """A Loop of 2^62 turns."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", "go", "on"), node("Relu", "v", "w")],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("v", FLOAT, [1, 4]),
        ],
        [value("on", TensorProto.BOOL, []), value("w", FLOAT, [1, 4])],
    )
    return make(
        [node("Loop", "turns start x", "y", body=body)],
        {"turns": np.array(1 << 62), "start": np.array(True)},
    )


def test_endless_loop_is_stopped(tmp_path: Path) -> None:
    _, out = accepted(tmp_path, endless())
    with pytest.raises(EdgewrightError) as caught, trial(out, "model.onnx", 2) as run:
        run({"x": np.ones((1, 4), np.float32)})
    assert caught.value.exit_code == 3
    assert "more than 2 s" in str(caught.value) and "loops that do not end" in str(caught.value)


def test_giant_tensor_is_a_clear_refusal(tmp_path: Path) -> None:
    """4 TB from 16 bytes; in a child with limits, so whatever happens, this process lives."""
    nodes = [
        node("ConstantOfShape", "s", "c"),
        node("ReduceSum", "c", "r", keepdims=0),
        node("Add", "x r", "y"),
    ]
    model = make(nodes, {"s": np.array([1 << 20, 1 << 20])})
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    out = tmp_path / "out.onnx"
    with pytest.raises(EdgewrightError) as caught:
        admit(tmp_path / "model.onnx", out)
        with trial(out, "model.onnx", 60) as run:
            run({"x": np.ones((1, 4), np.float32)})
    assert caught.value.exit_code == 3


def test_crash_is_the_models_fault(tmp_path: Path) -> None:
    """The smallest integer modulo -1 ends the runtime's process with SIGFPE on x86."""
    value = helper.make_tensor_value_info
    model = make(
        [node("Mod", "x z", "y")],
        inputs=[value(name, TensorProto.INT32, [1, 4]) for name in "xz"],
        outputs=[value("y", TensorProto.INT32, [1, 4])],
    )
    _, out = accepted(tmp_path, model)
    feed = {"x": np.full((1, 4), -(1 << 31), np.int32), "z": np.full((1, 4), -1, np.int32)}
    if platform.machine() != "x86_64":
        pytest.skip("integer overflow is no fault on this architecture")
    with pytest.raises(EdgewrightError, match="SIGFPE") as caught, trial(out, "m.onnx", 60) as run:
        run(feed)
    assert caught.value.exit_code == 3


def test_same_file_same_bytes(tmp_path: Path) -> None:
    first = accepted(tmp_path, dense())[1].read_bytes()
    assert accepted(tmp_path, dense())[1].read_bytes() == first
