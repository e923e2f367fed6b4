"""Golden vectors: a few real inputs, the outputs they must give, and how near is near enough.

How near. One runtime version on one instruction set gives the same bits, so there outputs must
be equal. Other instruction sets round differently: measured, the same int8 file differs by up
to 42 dB between x86 and ARM where the runtime fuses other kernels (about 1 % of an output's
largest value), while a true fault, saturating 16-bit sums on x86 without VNNI, costs 20 dB
(about 10 %). 2 % of the largest value lies between. Float models differ by 1e-7 per operation,
so 0.1 % is ample.
"""

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import BadInput, IntegrityError
from edgewright.runtime.cpu import host_isa

if TYPE_CHECKING:  # a device has numpy and this module, but neither profiles nor data sources
    from edgewright.target import Target

Feed = dict[str, np.ndarray]

MIN_VECTORS = 3
MAX_VECTORS = 8
VECTOR_BYTES = 2 << 20  # enough inputs; more than MIN_VECTORS are kept up to here
INT8_SHARE = 0.02
FLOAT_SHARE = 0.001
INT8_MIN_EQUAL = 0.9  # class numbers and the like flip where two scores are near each other
FLOAT_MIN_EQUAL = 0.99
SMALLEST_ATOL = 1e-6
# CPU flags by which ONNX Runtime's CPU kernels choose their code.
KERNEL_FLAGS = frozenset(
    ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl")
    + ("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")
    + ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16")
    + ("sme", "sme2")
)
REASON = (
    "equal bits where runtime version and instruction set are those of made_with; elsewhere "
    "kernels round differently, so {share:.1%} of the largest value of each output is allowed"
)


@dataclass(frozen=True)
class Difference:
    """How far one output is from its golden value; `fault` says what was not allowed."""

    max_abs: float
    equal: bool
    fault: str


def write_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz with one spelling: names sorted, stored uncompressed, the zip epoch as time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            content = io.BytesIO()
            array = np.asarray(arrays[name], order="C")
            np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, content.getvalue())
    return file.getvalue()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a golden archive: stored, no pickles, none larger than the file."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or not info.filename.endswith(".npy"):
                    raise IntegrityError(
                        f"golden vectors in {path.name}",
                        expected="arrays stored as they are",
                        found=ascii(info.filename[:80]),
                    )
                with archive.open(info) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
                arrays[info.filename[: -len(".npy")]] = array
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"golden vectors in {path.name} cannot be read", found=ascii(str(error)[:200])
        ) from None
    return arrays


def stack(vectors: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Vectors as the keys of one archive: `name__000`, `name__001`, ..."""
    return {f"{n}__{k:03d}": a for k, vector in enumerate(vectors) for n, a in vector.items()}


def unstack(
    arrays: Mapping[str, np.ndarray], names: Sequence[str], count: int
) -> list[dict[str, np.ndarray]]:
    """The opposite of `stack`; IntegrityError unless exactly these arrays are there."""
    wanted = {f"{name}__{k:03d}" for k in range(count) for name in names}
    if wanted != set(arrays):
        raise IntegrityError(
            "the golden vectors are not those of the manifest",
            expected=f"{count} arrays for each of {len(names)} names",
            found=f"{len(arrays)} arrays",
        )
    return [{name: arrays[f"{name}__{k:03d}"] for name in names} for k in range(count)]


def choose(samples: Iterable[Feed], most: int = MAX_VECTORS) -> list[Feed]:
    """The first samples: MIN_VECTORS if there are as many, on to `most` while they stay small."""
    chosen: list[Feed] = []
    size = 0
    for feed in islice(samples, most):
        size += sum(array.nbytes for array in feed.values())
        if len(chosen) >= MIN_VECTORS and size > VECTOR_BYTES:
            break
        chosen.append(feed)
    return chosen


def tolerances(
    vectors: Sequence[Mapping[str, np.ndarray]], quantized: bool
) -> list[dict[str, Any]]:
    """The manifest's tolerance of each output, from the range it has in these vectors.

    BadInput where an output is NaN: it would prove nothing.
    """
    share = INT8_SHARE if quantized else FLOAT_SHARE
    rows = []
    for name in vectors[0]:
        arrays = [np.asarray(vector[name]) for vector in vectors]
        if any(a.dtype.kind in "fc" and np.isnan(a).any() for a in arrays):
            raise BadInput(
                f"output '{name}' is NaN for a calibration sample",
                expected="numbers, so that a device can be proven against them",
                hint="check the model and the sample",
            )
        if all(a.dtype.kind == "f" for a in arrays):
            finite = [np.abs(a[np.isfinite(a)].astype(np.float64)) for a in arrays]
            top = max((float(a.max()) for a in finite if a.size), default=0.0)
            # Three digits: the tolerance of a tolerance does not deserve more.
            row = {"atol": float(f"{max(share * top, SMALLEST_ATOL):.2e}"), "min_equal": 1}
        else:
            row = {"atol": 0, "min_equal": INT8_MIN_EQUAL if quantized else FLOAT_MIN_EQUAL}
        rows.append({"output": name, "rtol": 0, **row})
    return rows


def compare(found: np.ndarray, golden: np.ndarray, tolerance: Mapping[str, Any]) -> Difference:
    """One output of one vector against its golden value."""
    if found.shape != golden.shape or found.dtype != golden.dtype:
        fault = (
            f"expected {golden.dtype} {list(golden.shape)}, found {found.dtype} {list(found.shape)}"
        )
        return Difference(float("inf"), False, fault)
    if found.tobytes() == golden.tobytes():
        return Difference(0.0, True, "")
    if found.dtype.kind == "b":
        found, golden = found.astype(np.uint8), golden.astype(np.uint8)
    kind = np.complex128 if found.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(found.astype(kind) - golden.astype(kind))
        allowed = tolerance["atol"] + tolerance["rtol"] * np.abs(golden.astype(kind))
        near = (gap <= allowed) | (found == golden)
    gap = np.where(found == golden, 0.0, np.where(np.isnan(gap), np.inf, gap))
    worst = float(gap.max())
    if near.mean() >= tolerance["min_equal"]:
        return Difference(worst, False, "")
    fault = f"max |difference| {worst:.4g}, allowed {tolerance['atol']:.4g}"
    if tolerance["min_equal"] < 1:
        fault = f"{near.mean():.1%} of the values agree, required {tolerance['min_equal']:.1%}"
    return Difference(worst, False, fault)


def made_with(
    target: "Target | None", arch: str, runtime: str, flags_there: Sequence[str] = ()
) -> dict[str, Any]:
    """What decides the bits of an output: runtime version and the kernels it chooses.

    `target` None: this machine itself. `flags_there`: of the CPU of a device behind SSH.
    """
    emulated = target is not None and target.emulated
    if target is not None and target.run.how == "ssh":
        flags = set(flags_there)
    elif target is not None and emulated:
        flags = set(target.run.cpu_features.split()) | set(target.device.isa)
    else:
        flags = set(host_isa())
    return {
        "runtime": runtime,
        "arch": arch,
        "isa": sorted(flags & KERNEL_FLAGS),
        "emulated": emulated,
    }
