"""Models with a common trunk: stored once, in memory once, and right."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from conftest import tiny_model
from onnx import helper, numpy_helper

from edgewright.runtime.local import open_local
from edgewright.runtime.pooled import open_pooled

WIDE = 768


def trunk(head: int) -> onnx.ModelProto:
    """Four layers that all models share, and a head of its own: 9.4 MB and 30 kB."""
    rng = np.random.default_rng(0)
    tensors = [rng.normal(0, 1 / 28, (WIDE, WIDE)).astype(np.float32) for _ in range(4)]
    tensors.append(np.random.default_rng(head).normal(size=(WIDE, 10)).astype(np.float32))
    nodes, flow = [], "x"
    for k in range(len(tensors)):
        nodes.append(helper.make_node("MatMul", [flow, f"w{k}"], [f"h{k}"], name=f"m{k}"))
        flow = f"h{k}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, WIDE])],
        [helper.make_tensor_value_info(flow, onnx.TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(t, f"w{k}") for k, t in enumerate(tensors)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pooled(edgewright, folder: Path, count: int = 3) -> tuple[Path, list[str], dict]:
    names = [f"task{k}" for k in range(count)]
    for k, name in enumerate(names):
        onnx.save(trunk(k + 1), folder / f"{name}.onnx")
    out = folder / "pool"
    ran = edgewright("pool", *(folder / f"{n}.onnx" for n in names), "-o", out, "--json")
    assert ran.code == 0, ran.err
    return out, names, ran.json


def test_stored_once_and_right(edgewright, tmp_path: Path) -> None:
    out, names, report = pooled(edgewright, tmp_path)
    shared = 4 * WIDE * WIDE * 4
    assert all(row["shared_bytes"] == shared and row["shared_tensors"] == 4
               for row in report["models"])  # fmt: skip
    assert report["pooled_bytes"] < shared + 3 * 40_000
    assert report["separate_bytes"] > 3 * shared
    x = {"x": np.random.default_rng(9).normal(size=(1, WIDE)).astype(np.float32)}
    sessions = open_pooled(out, names)
    for name in names:
        alone = open_local(tmp_path / f"{name}.onnx").run(x)[0]
        # Unpacked weights take another kernel: the same sums in another order.
        assert np.allclose(sessions[name].run(x)[0], alone, rtol=1e-4, atol=1e-4)
        assert np.allclose(open_local(out / f"{name}.onnx").run(x)[0], alone, rtol=1e-4, atol=1e-4)


GROWTH = """
import sys
from pathlib import Path
import numpy as np
from edgewright.runtime.local import open_local
from edgewright.runtime.pooled import open_pooled

def resident():
    rows = dict(line.split(":") for line in open("/proc/self/status"))
    return int(rows["VmRSS"].split()[0]) * 1024

folder, names = Path(sys.argv[2]), sys.argv[3:]
x = {"x": np.ones((1, 768), np.float32)}
before = resident()
if sys.argv[1] == "shared":
    sessions = list(open_pooled(folder, names).values())
else:
    sessions = [open_local(folder / f"{name}.onnx") for name in names]
for session in sessions:
    session.run(x)
print(resident() - before)
"""


def test_in_memory_once(edgewright, tmp_path: Path) -> None:
    out, names, _ = pooled(edgewright, tmp_path, 4)

    def growth(how: str, count: int) -> int:
        words = [sys.executable, "-c", GROWTH, how, str(out), *names[:count]]
        return int(subprocess.run(words, capture_output=True, check=True).stdout)

    trunk_bytes = 4 * WIDE * WIDE * 4
    # Three more models: no more weights where they are shared, each its own where they are not.
    assert growth("shared", 4) - growth("shared", 1) < 0.5 * trunk_bytes
    assert growth("apart", 4) - growth("apart", 1) > 2.5 * trunk_bytes


def test_nothing_in_common_is_said_as_it_is(edgewright, tmp_path: Path) -> None:
    """Then the pool is a little larger than the models apart, not "-N fewer"."""
    onnx.save(tiny_model(), tmp_path / "m0.onnx")
    onnx.save(trunk(1), tmp_path / "m1.onnx")
    ran = edgewright("pool", tmp_path / "m0.onnx", tmp_path / "m1.onnx", "-o", tmp_path / "pool")
    assert ran.code == 0, ran.err
    assert "more than apart" in ran.out and "-" not in ran.out


def test_refusals(edgewright, tmp_path: Path) -> None:
    onnx.save(tiny_model(), tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_bytes(b"no model")
    out = tmp_path / "pool"
    ran = edgewright("pool", tmp_path / "a.onnx", tmp_path / "b.onnx", "-o", out)
    assert ran.code == 3 and not out.exists()
    assert edgewright("pool", tmp_path / "a.onnx", "-o", out).code == 2
    ran = edgewright("pool", tmp_path / "a.onnx", tmp_path / "c.onnx", "-o", out)
    assert ran.code == 3 and "c.onnx" in ran.err
    files = (tmp_path / "a.onnx", tmp_path / "b.onnx")
    for option in ("--name", "--target", "--sign"):
        ran = edgewright("pool", *files, "-o", out, option, "x")
        assert ran.code == 2 and "with bundles only" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
