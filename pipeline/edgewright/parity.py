"""How close the outputs of two models are, tallied over samples."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewright.errors import BadInput

# How far an output may lie from torch's, as a share of the output's largest value. Both sides
# add the same products in another order: a sum of n terms differs by about sqrt(n) roundings
# of 6e-8 in float32, and some hundred layers of 1e4 terms reach 1e-4. An exporter's mistake
# (an epsilon, a padding, a transposed weight) shows as 1e-2 or more.
TOLERANCE = {"float16": 3e-2, "float32": 1e-3, "float64": 1e-6}
MAX_OTHER_INDICES = 0.01  # share of integer outputs (an argmax near a tie) that may differ
EQUAL_DB = 200.0  # the SQNR of equal outputs


@dataclass
class Tally:
    """One output over the samples: its range, and how far the exported model is from torch.

    `source` is the model as messages name it.
    """

    name: str
    source: str
    dtype: str = ""
    largest: float = 0.0
    infinite: int = 0
    values: int = 0
    difference: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    other: int = 0
    compared: bool = False

    def see(self, value: np.ndarray, k: int) -> None:
        """Take in the output of sample `k`; BadInput for NaN."""
        self.dtype = str(value.dtype)
        self.values += value.size
        if value.dtype.kind != "f":
            return
        if np.isnan(value).any():
            raise BadInput(
                f"{self.source}: output '{self.name}' holds NaN on calibration sample {k}",
                expected="finite numbers",
                hint="check that the calibration data is prepared as in training; then the model",
            )
        finite = value[np.isfinite(value)]
        self.infinite += value.size - finite.size
        if finite.size:
            self.largest = max(self.largest, float(np.abs(finite).max()))

    def compare(self, reference: np.ndarray, value: np.ndarray, k: int) -> None:
        """Take in torch's output and the exported model's; BadInput where they cannot be one."""
        self.compared = True
        if reference.shape != value.shape:
            raise BadInput(
                f"parity of {self.source}: output '{self.name}' on calibration sample {k}",
                expected=f"shape {list(reference.shape)}, as torch",
                found=f"{list(value.shape)}",
                hint="forward depends on sizes in a way the exporter fixed; export it yourself",
            )
        self.see(reference, k)
        if reference.dtype.kind != "f":
            self.other += int((reference != value).sum())
            return
        wide, exported = reference.astype(np.float64), value.astype(np.float64)
        finite = np.isfinite(wide)
        if not np.array_equal(wide[~finite], exported[~finite]) or np.isnan(exported).any():
            self.difference = math.inf
            return
        gap = np.abs(wide[finite] - exported[finite])
        self.difference = max(self.difference, float(gap.max(initial=0.0)))
        self.signal += float(np.square(wide[finite]).sum())
        self.noise += float(np.square(gap).sum())

    def relative(self) -> float:
        """The largest difference as a share of the output's largest value."""
        if not self.difference:
            return 0.0
        return self.difference / self.largest if self.largest else math.inf

    def sqnr_db(self) -> float:
        """10 log10(signal / noise), as `kit.py` counts it."""
        if not self.noise or not self.signal:
            return EQUAL_DB if not self.noise else 0.0
        return min(EQUAL_DB, 10 * math.log10(self.signal / self.noise))

    def failure(self) -> str:
        """Why this output is not torch's, "" where it is."""
        if self.dtype in TOLERANCE:
            limit = TOLERANCE[self.dtype]
            if not self.relative() <= limit:
                return f"differs by {self.relative():.2g} of its largest value (limit {limit:g})"
        elif self.other > MAX_OTHER_INDICES * self.values:
            return f"{self.other} of {self.values} values differ"
        return ""

    def warnings(self) -> list[str]:
        told = []
        if self.infinite:
            told.append(f"output '{self.name}' holds {self.infinite} infinite values")
        if self.other:
            told.append(f"output '{self.name}': {self.other} of {self.values} whole numbers differ")
        return told

    def report(self) -> dict[str, Any]:
        base: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "largest": self.largest}
        if not self.compared:
            return base
        if self.dtype in TOLERANCE:
            return {
                **base,
                "max_abs": self.difference,
                "max_rel": self.relative(),
                "limit_rel": TOLERANCE[self.dtype],
                "sqnr_db": round(self.sqnr_db(), 1),
            }
        return {**base, "values": self.values, "different": self.other}
