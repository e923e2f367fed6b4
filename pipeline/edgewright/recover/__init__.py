"""What pruning lost comes back without labels: the library behind the stage `recover`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from edgewright.data import Feed
from edgewright.errors import EnvironmentMissing
from edgewright.recipe import HOLD, RecoverSettings
from edgewright.recover.variants import with_variants


@contextmanager
def needs_torch(what: str, otherwise: str) -> Iterator[None]:
    """Around an import that brings torch: EnvironmentMissing with the way out where it is absent.

    otherwise: what to set in the recipe instead.
    """
    try:
        yield
    except ImportError as error:
        raise EnvironmentMissing(
            f"{what} needs torch",
            found=str(error),
            hint=f"pip install 'edgewright[torch]', or set {otherwise}",
        ) from None


def fitting(settings: RecoverSettings, feeds: Iterable[Feed]) -> Iterator[Feed]:
    """The samples that compensation is fitted on, and variants of them: not those that training
    is judged by.

    On samples it was fitted on the start looks nearer to the original than it is, and early
    stopping would keep it.
    """
    held = settings.method == "distill"
    mine = (feed for k, feed in enumerate(feeds) if not held or k % HOLD != HOLD - 1)
    return with_variants(mine, settings.vary)
