"""What compensation may see."""

import numpy as np

from edgewright.recipe import RecoverSettings
from edgewright.recover import fitting


def test_compensation_does_not_see_what_training_is_judged_by() -> None:
    feeds = [{"x": np.array(k)} for k in range(12)]
    seen = [int(f["x"]) for f in fitting(RecoverSettings(method="distill"), feeds)]
    assert seen == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]  # 4 and 9 are held out, as in `lesson`
    assert list(fitting(RecoverSettings(), feeds)) == feeds
