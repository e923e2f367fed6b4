"""[share] of a recipe: which weights share their values, and how that is trained."""

from dataclasses import dataclass
from typing import Literal

from edgewright.errors import BadInput
from edgewright.settings import SEEDS, check_limits


@dataclass(frozen=True, kw_only=True)
class AssignmentTraining:
    """[share.train]: the training of a soft assignment, by the model's own answers, no labels.

    steps, batch, seed: of the optimiser. rate: the largest relative change of a tensor per step;
    0 tries some in short cycles. samples: calibration samples kept in memory. threads: the
    result's last bits depend on their number.
    """

    steps: int = 300
    rate: float = 0.0
    batch: int = 16
    samples: int = 1024
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """[share]: weights that share their values. Absent: only equal tensors, as `simplify` does.

    codebook: values that all weights of one codebook take, 2 to 256; 0 for none. scope: a
    codebook per layer, or one for the model. assignment: hard = k-means, every weight takes the
    nearest value; soft = from there, weights as mixtures of the values are trained until each
    is one of them (needs torch). train: how. max_drop: share of the metric that clustering may
    cost; where it costs more, the codebook is doubled, and given up beyond 256. compress: also
    write the bundle as NAME.bundle.tar.xz, entropy coded, for the way to the device.
    """

    codebook: int = 0
    scope: Literal["layer", "model"] = "layer"
    assignment: Literal["hard", "soft"] = "hard"
    train: AssignmentTraining = AssignmentTraining()
    max_drop: float = 0.01
    compress: bool = False


def check_share(share: ShareSettings, where: str) -> None:
    """Numbers that can be, and no training that nothing asks for."""
    limits: dict[str, tuple[float, float]] = {
        "steps": (5, 10**7), "rate": (0, 0.5), "batch": (1, 4096), "samples": (5, 10**6),
        "seed": SEEDS, "threads": (1, 256),
    }  # fmt: skip
    check_limits(share.train, limits, f"{where}: share.train")
    check_limits(share, {"max_drop": (0, 1)}, f"{where}: share")
    if share.codebook != 0 and not 2 <= share.codebook <= 256:
        raise BadInput(
            f"{where}: share.codebook", expected="0, or 2 to 256", found=str(share.codebook)
        )
    if share.assignment == "soft" and not share.codebook:
        raise BadInput(
            f"{where}: share.assignment without share.codebook", hint="add codebook = 16"
        )
    if share.assignment == "hard" and share.train != AssignmentTraining():
        raise BadInput(
            f"{where}: share.train without a soft assignment", hint='add assignment = "soft"'
        )
