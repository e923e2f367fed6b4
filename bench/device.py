"""Time and memory of the single-file device program on a signed bundle of 20 MB.

    .venv/bin/python bench/device.py [--megabytes 20] [--runs 5]

Wall and CPU time are those of the whole process, Python's start included, best of the runs, which
take turns; memory is the highest resident size of the process. With the self-test, numpy is
loaded, and onnxruntime and the model run in a child, whose time counts and whose memory does not.
It starts while the bundle is unpacked. Everything is flushed to the disk below --folder, so wall
time is that of the disk, too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

from edgewright import bundle, signing
from edgewright.device import pack
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import parse_target


def make(folder: Path, megabytes: float) -> Path:
    """A signed bundle whose model holds that many bytes of weights that nothing can compress."""
    columns = int(megabytes * 1e6 / 4 / 512)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(512, columns)).astype(np.float32)
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        wide (float[N, 512] x) => (float[N, {columns}] y) {{ y = MatMul (x, w) }}"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "calibration.npz", x=rng.normal(size=(3, 512)).astype(np.float32))
    recipe = {
        "model": {"name": "wide", "version": "1", "source": "model.onnx"},
        "data": {"calibration": "calibration.npz"},
    }
    device = {"arch": os.uname().machine, "compatible": ["linux"]}
    job = Job(
        recipe=parse_recipe(recipe, folder),
        target=parse_target({"name": "here", "description": "this machine", "device": device}),
        folder=folder,
        model=folder / "model.onnx",
    )
    path = folder / bundle.run(job)["bundle"]
    signing.keygen(folder / "key")
    signing.sign_bundle(path, [signing.signer(str(folder / "key"), {})], any_verdict=True)
    return path


# A process inherits the highest resident size of who forked it, so it must tell its own.
CHILD = """
import atexit, runpy, sys
def tell(path=sys.argv.pop(1)):
    text = open("/proc/self/status").read()
    open(path, "w").write(text.split("VmHWM:")[1].split()[0])
atexit.register(tell)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measured(program: Path, words: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MB of a command that succeeds."""
    peak = program.with_name("peak")
    start = [sys.executable, "-I", "-c", CHILD, str(peak), str(program), *words]
    begin = time.perf_counter()
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        sys.exit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return wall, usage.ru_utime + usage.ru_stime, int(peak.read_text()) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to install; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        path = make(folder, args.megabytes)
        program = folder / "device.pyz"
        program.write_bytes(pack.program())
        trust = ["--trust", str(folder / "key.pub")]
        tests = {
            "start (--version)": lambda k: ["--version"],
            "verify": lambda k: ["verify", str(path), *trust],
            "install, no self-test": lambda k: [
                *("install", str(path), "--root", str(folder / f"quick{k}"), *trust),
                "--no-self-test",
            ],
            "install with self-test": lambda k: [
                *("install", str(path), "--root", str(folder / f"full{k}"), *trust)
            ],
            "self-test of what runs": lambda k: ["self-test", "--root", str(folder / f"full{k}")],
        }
        load = os.getloadavg()[0]
        print(f"bundle {path.stat().st_size / 1e6:.1f} MB, {os.cpu_count()} cores, load {load:.1f}")
        found: dict[str, list[tuple[float, float, float]]] = {title: [] for title in tests}
        for k in range(args.runs):
            for title, words in tests.items():
                found[title].append(measured(program, words(k)))
        for title, rows in found.items():
            wall, cpu = (min(row[k] for row in rows) for k in range(2))
            peak = max(row[2] for row in rows)
            print(f"{title:24} wall {wall:6.3f} s  cpu {cpu:6.3f} s  peak {peak:6.1f} MB")


if __name__ == "__main__":
    main()
