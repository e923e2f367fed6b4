"""The true classes of the calibration samples, where the recipe names them."""

import numpy as np

from edgewright.errors import BadInput
from edgewright.recipe import Recipe


def truth_of(recipe: Recipe) -> np.ndarray | None:
    """`recover.labels` as int64 (samples,); None where it is not given. BadInput for other data."""
    if recipe.recover is None or not recipe.recover.labels:
        return None
    path = recipe.path(recipe.recover.labels)
    try:
        labels = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise BadInput(f"labels not found: {path}", hint="check recover.labels") from None
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path} cannot be read", expected="an .npy", found=str(error)) from None
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise BadInput(
            f"labels {path}",
            expected="one whole number for each calibration sample",
            found=f"{getattr(labels, 'dtype', '?')} {list(getattr(labels, 'shape', []))}",
        )
    return labels.astype(np.int64)
