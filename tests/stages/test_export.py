"""The export stage: torch to ONNX with proof, and ONNX files let in."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright import export
from edgewright.errors import BadInput, EdgewrightError, EnvironmentMissing
from edgewright.metric import Metric
from edgewright.recipe import load_recipe
from edgewright.runtime.local import open_local
from edgewright.stage import Job
from edgewright.target import load_target

KIT = Path(__file__).resolve().parents[3] / "shared" / "kit"
DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


def job_for(recipe: Path, folder: Path) -> Job:
    folder.mkdir(parents=True)
    return Job(recipe=load_recipe(recipe), target=load_target("cpu"), folder=folder)


def write_recipe(folder: Path, source: str, inputs: str = "", calibration: str = "") -> Path:
    """A recipe in `folder`; calibration.npz is what the caller stored there."""
    path = folder / "recipe.toml"
    path.write_text(
        f'[model]\nname = "m"\nversion = "1"\nsource = "{source}"\n{inputs}\n'
        f'[data]\ncalibration = "{calibration or "calibration.npz"}"\n'
    )
    return path


def store(folder: Path, **arrays: np.ndarray) -> None:
    np.savez(folder / "calibration.npz", **arrays)  # type: ignore[arg-type]


def torch_job(tmp_path: Path, code: str, inputs: str = "", **arrays: np.ndarray) -> Job:
    """A job whose model is `code` (a net.py with `build`)."""
    pytest.importorskip("torch")
    head = "import torch\nfrom torch import nn\n"
    (tmp_path / "net.py").write_text(head + textwrap.dedent(code))
    store(tmp_path, **(arrays or {"x": normal(3, 4)}))
    return job_for(write_recipe(tmp_path, "net.py:build", inputs), tmp_path / "run")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def texts(report: dict[str, Any]) -> str:
    return " | ".join(f"{n['level']}: {n['text']}" for n in report["notes"])


def refusal(job: Job) -> str:
    with pytest.raises(EdgewrightError) as caught:
        export.run(job)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200
    return message


# --- PyTorch ----------------------------------------------------------------------------------

SMALL = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.drop = nn.Dropout(0.5)
            self.norm = nn.BatchNorm1d(3)
        def forward(self, x):
            return self.norm(self.drop(torch.relu(self.fc(x))))
    def build():
        torch.manual_seed(1)
        return Net(){end}, (torch.zeros(2, 4),)
"""
FREE_X = '[model.inputs.x]\nshape = ["batch", 4]'


def test_the_exported_model_is_torchs_equal(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    job = torch_job(tmp_path, SMALL.format(end=".eval()"), FREE_X, x=normal(3, 1, 4))
    report = export.run(job)
    assert report["source"]["kind"] == "torch" and report["source"]["class"] == "Net"
    assert report["notes"] == []
    (output,) = report["parity"]["outputs"]
    assert report["parity"]["samples"] == 3
    assert output["max_rel"] < 1e-5 and output["sqnr_db"] > 100
    assert report["model"]["opset"] == export.OPSET
    assert [p.name for p in job.folder.iterdir()] == ["model.onnx"]

    sys.path.insert(0, str(tmp_path))
    try:
        import net

        module, _ = net.build()
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["net"]
    x = normal(5, 4)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(open_local(job.output_model()).run({"x": x})[0], expected, atol=1e-5)


def test_training_mode_is_ended_and_noted(tmp_path: Path) -> None:
    report = export.run(torch_job(tmp_path, SMALL.format(end=""), FREE_X))
    assert "warning: 4 modules were in training mode" in texts(report)
    assert report["parity"]["outputs"][0]["max_rel"] < 1e-5


def test_one_module_left_in_training_mode_is_noticed(tmp_path: Path) -> None:
    code = SMALL.format(end=".eval()").replace("return Net().eval(),", "return mixed(),")
    code += """
    def mixed():
        net = Net().eval()
        net.norm.train()
        return net
"""
    assert "1 modules were in training mode (norm)" in texts(
        export.run(torch_job(tmp_path, code, FREE_X))
    )


def test_named_dimensions_are_free_others_fixed(tmp_path: Path) -> None:
    code = """
        class Net(nn.Module):
            def forward(self, x, scale):
                return x * scale, {"sum": x.sum(dim=1)}
        def build():
            return Net(), {"scale": torch.ones(1), "x": torch.zeros(1, 7, 4)}
    """
    inputs = '[model.inputs.x]\nshape = ["batch", "time", 4]'
    job = torch_job(tmp_path, code, inputs, x=normal(2, 1, 5, 4), scale=normal(2, 1))
    report = export.run(job)
    graph = onnx.load(job.output_model()).graph
    x, scale = graph.input
    assert (x.name, scale.name) == ("x", "scale")
    dims = x.type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_param, dims[2].dim_value) == ("batch", "time", 4)
    assert scale.type.tensor_type.shape.dim[0].dim_value == 1
    session = open_local(job.output_model())
    for batch, time in ((1, 1), (3, 2), (2, 50)):
        x_value, factor = normal(batch, time, 4), normal(1)
        product, total = session.run({"x": x_value, "scale": factor})
        np.testing.assert_allclose(product, x_value * factor, rtol=1e-6)
        np.testing.assert_allclose(total, x_value.sum(1), atol=1e-5)
    assert len(report["parity"]["outputs"]) == 2


def test_a_new_name_for_every_input(tmp_path: Path) -> None:
    code = """
        class Net(nn.Module):
            def forward(self, a, b):
                return a - b
        def build():
            return Net(), (torch.zeros(2, 4), torch.zeros(2, 4))
    """
    inputs = '[model.inputs.left]\nshape = ["n", 4]\n[model.inputs.right]\nshape = ["n", 4]'
    job = torch_job(tmp_path, code, inputs, left=normal(2, 4), right=np.zeros((2, 4), np.float32))
    export.run(job)
    assert [v.name for v in onnx.load(job.output_model()).graph.input] == ["left", "right"]


def test_the_same_bytes_from_two_processes_and_no_paths(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    digests = set()
    for k, seed in enumerate(("0", "7")):
        folder = tmp_path / str(k) / "here"
        folder.mkdir(parents=True)
        (folder / "net.py").write_text(
            "import torch\nfrom torch import nn\n" + textwrap.dedent(SMALL.format(end=".eval()"))
        )
        store(folder, x=normal(2, 4))
        recipe = write_recipe(folder, "net.py:build", FREE_X)
        script = (
            "import sys; from pathlib import Path; from edgewright import export;"
            "from edgewright.stage import Job; from edgewright.recipe import load_recipe;"
            "from edgewright.target import load_target;"
            "export.run(Job(recipe=load_recipe(Path(sys.argv[1])), target=load_target('cpu'),"
            "folder=Path(sys.argv[2])))"
        )
        subprocess.run(
            [sys.executable, "-c", script, str(recipe), str(folder)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        data = (folder / "model.onnx").read_bytes()
        assert b"net.py" not in data and str(tmp_path).encode() not in data
        assert b"site-packages" not in data
        digests.add(hashlib.sha256(data).hexdigest())
    assert len(digests) == 1


def test_nothing_is_printed_to_standard_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export.run(torch_job(tmp_path, SMALL.format(end=".eval()"), FREE_X))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def build():\n    return nn.Linear(4, 4)", "returned Linear; expected (torch.nn.Module"),
        ("def build():\n    return {}, (torch.zeros(1, 4),)", "returned dict as the model"),
        ("def build():\n    return nn.Linear(4, 4), ()", "example inputs"),
        ("def build():\n    return nn.Linear(4, 4), ([1.0],)", "expected a tensor; found list"),
        (
            "def build():\n    return nn.Linear(4, 4), {'inputs': torch.zeros(1, 4)}",
            "did you mean 'input'?",
        ),
        (
            "def build():\n    return nn.Linear(4, 4), (torch.zeros(1), torch.zeros(1))",
            "at most 1, the named arguments of forward (input)",
        ),
        ("def build():\n    raise ValueError('no weights')", "ValueError: no weights"),
        ("def other():\n    pass", "no function 'build'"),
        ("import nonsense_module", "ModuleNotFoundError"),
        (
            "class Net(nn.Module):\n"
            "    def forward(self, x):\n"
            "        return x if x.sum() > 0 else -x\n"
            "def build():\n    return Net(), (torch.zeros(2, 4),)",
            "torch.onnx cannot export",
        ),
        (
            "class Net(nn.Module):\n"
            "    def forward(self, x):\n"
            "        return nn.functional.dropout(x, 0.5, training=True)\n"
            "def build():\n    return Net(), (torch.ones(1, 4),)",
            "parity",
        ),
        (
            "class Net(nn.Module):\n"
            "    def forward(self, x):\n"
            "        return torch.log(x - 1e9)\n"
            "def build():\n    return Net(), (torch.ones(1, 4),)",
            "NaN on calibration sample 0",
        ),
        (
            "def build():\n"
            "    net = nn.Linear(4, 4)\n"
            "    net.weight.data[1, 2] = float('nan')\n"
            "    return net, {'input': torch.zeros(1, 4)}",
            "1 NaN of 16 values",
        ),
    ],
)
def test_refusals(tmp_path: Path, code: str, words: str) -> None:
    name = "input" if "Linear" in code else "x"
    job = torch_job(tmp_path, code, **{name: normal(2, 1, 4)})
    message = refusal(job)
    assert words in message
    assert "net.py" in message


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("[model.inputs.y]\nshape = [1, 4]\n[model.inputs.z]\nshape = [1]", "no argument"),
        ("[model.inputs.x]\nshape = [1, 4]", "expected shape [1, 4]"),
        ('[model.inputs.x]\nshape = ["n"]', "expected shape ['n']"),
    ],
)
def test_recipe_and_examples_disagree(tmp_path: Path, inputs: str, words: str) -> None:
    assert words in refusal(torch_job(tmp_path, SMALL.format(end=".eval()"), inputs))


def test_a_dimension_that_torch_fixed(tmp_path: Path) -> None:
    code = """
        class Net(nn.Module):
            def forward(self, x):
                return x.reshape(2, 4) + 1
        def build():
            return Net(), (torch.zeros(2, 4),)
    """
    message = refusal(torch_job(tmp_path, code, FREE_X, x=normal(2, 2, 4)))
    assert "net.py:build" in message


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text("def build():\n    pass\n")
    job = job_for(write_recipe(tmp_path, "net.py:build"), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EnvironmentMissing, match=r"edgewright\[torch\]") as caught:
        export.run(job)
    assert caught.value.exit_code == 6


def test_the_example(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    job = job_for(DIGITS / "recipe.toml", tmp_path / "run")
    report = export.run(job)
    assert report["notes"] == []
    assert report["parity"]["samples"] == export.SAMPLES
    assert report["parity"]["outputs"][0]["sqnr_db"] > 100
    session = open_local(job.output_model())
    assert 0.98 < Metric(job.recipe).score(session.run) < 1  # some errors: losses can show


# --- ONNX -------------------------------------------------------------------------------------


def onnx_job(
    tmp_path: Path,
    inputs: str = "",
    op: str = "Relu",
    shape: tuple[int | str, ...] = ("batch", 4),
    **arrays: np.ndarray,
) -> Job:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, list(shape))],
        [value("y", TensorProto.FLOAT, list(shape))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    store(tmp_path, **(arrays or {"x": normal(20, 4)}))
    return job_for(write_recipe(tmp_path, "model.onnx", inputs), tmp_path / "run")


def test_onnx_is_admitted_and_run(tmp_path: Path) -> None:
    job = onnx_job(tmp_path, FREE_X)
    told: list[str] = []
    report = export.run(Job(**{**vars(job), "tell": lambda text, *_: told.append(text)}))
    source = report["source"]
    assert source["kind"] == "onnx"
    data = (tmp_path / "model.onnx").read_bytes()
    assert source["sha256_source"] == hashlib.sha256(data).hexdigest()
    assert source["bytes_source"] == len(data)
    assert report["parity"]["samples"] == export.SAMPLES
    assert report["model"]["operators"] == {"Relu": 1}
    assert told[0] == "exporting" and told.count("proving parity") == export.SAMPLES
    json.dumps(report, allow_nan=False)  # reports are JSON data


def test_onnx_with_nan_outputs(tmp_path: Path) -> None:
    message = refusal(onnx_job(tmp_path, op="Sqrt", x=np.array([[4.0] * 4, [-1.0] * 4], "f")))
    assert "output 'y' holds NaN on calibration sample 1" in message


def test_onnx_with_infinite_outputs_is_noted(tmp_path: Path) -> None:
    report = export.run(onnx_job(tmp_path, op="Log", x=np.array([[0.0, 1.0, 2.0, 3.0]], "f")))
    assert "warning: output 'y' holds 1 infinite values" in texts(report)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ('[model.inputs.xx]\nshape = ["batch", 4]', "did you mean 'x'?"),
        ('[model.inputs.x]\nshape = ["batch"]', "has 1 dimensions"),
        ('[model.inputs.x]\nshape = ["batch", 5]', "dimension 1 is 5; expected 4"),
        ('[model.inputs.x]\nshape = ["batch", "width"]', "dimension 1 is 'width'; expected 4"),
    ],
)
def test_recipe_and_onnx_disagree(tmp_path: Path, inputs: str, words: str) -> None:
    assert words in refusal(onnx_job(tmp_path, inputs))


def test_recipe_may_fix_a_free_dimension(tmp_path: Path) -> None:
    job = onnx_job(tmp_path, "[model.inputs.x]\nshape = [1, 4]")
    assert export.run(job)["model"]["nodes"] == 1


def test_broken_calibration_data_is_found_here(tmp_path: Path) -> None:
    message = refusal(onnx_job(tmp_path, x=np.array([[1, 2, 3, 4], [1, np.nan, 3, 4]], "f")))
    assert "calibration sample 1, input 'x'" in message and "NaN" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("weights.pt", "checkpoint"),
        ("weights.pth", "weights_only=True"),
        ("model.tflite", "another kind of file"),
        ("none.onnx", "not found"),
        ("none.py:build", "not found"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, source: str, words: str) -> None:
    if ".py" in source:
        pytest.importorskip("torch")
    (tmp_path / "weights.pt").write_bytes(b"never opened")
    store(tmp_path, x=normal(1, 4))
    assert words in refusal(job_for(write_recipe(tmp_path, source), tmp_path / "run"))


def test_external_data_ends_up_inside(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    tensor = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    (tmp_path / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    store(tmp_path, x=normal(3, 4))
    job = job_for(write_recipe(tmp_path, "model.onnx"), tmp_path / "run")
    report = export.run(job)
    assert [f["location"] for f in report["source"]["external_files"]] == ["w.bin"]
    assert [p.name for p in job.folder.iterdir()] == ["model.onnx"]
    assert open_local(job.output_model()).run({"x": normal(1, 4)})[0].shape == (1, 4)


@pytest.mark.kit
@pytest.mark.skipif(not KIT.is_dir(), reason="no measuring kit beside the repository")
@pytest.mark.parametrize("case", sorted(p.name for p in KIT.glob("*/")) if KIT.is_dir() else [])
def test_kit_models_are_admitted(tmp_path: Path, case: str) -> None:
    report = export.run(job_for(KIT / case / "recipe.toml", tmp_path / "run"))
    assert report["parity"]["samples"] == export.SAMPLES
    assert not [n for n in report["notes"] if n["level"] == "warning"]


def test_a_refusal_writes_nothing(tmp_path: Path) -> None:
    job = onnx_job(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(BadInput, match="empty"):
        export.run(job)
    assert list(job.folder.iterdir()) == []
