"""The true classes of the calibration samples, where the recipe names them."""

import numpy as np
import onnx

from edgewright import model as graph
from edgewright.errors import BadInput
from edgewright.recipe import Recipe


def truth_of(recipe: Recipe, model: onnx.ModelProto) -> np.ndarray | None:
    """`recover.labels` as int64 (samples,); None where it is not given.

    BadInput for other data, and for numbers that are no class of the model's first output.
    """
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
    classes = classes_of(model)
    wrong = labels[(labels < 0) | (labels >= classes)] if classes else labels[labels < 0]
    if wrong.size:
        raise BadInput(
            f"labels {path}",
            expected=f"classes 0 to {classes - 1}" if classes else "classes from 0 on",
            found=str(wrong[0]),
            hint="labels are the numbers of the model's outputs, counted from 0",
        )
    return labels.astype(np.int64)


def classes_of(model: onnx.ModelProto) -> int:
    """How many classes a first output (samples, classes) tells apart; 0 where that is not known."""
    shape = graph.value_facts(model.graph.output[0])["shape"] or []
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else 0
