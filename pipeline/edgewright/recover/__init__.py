"""The stage `recover`: what pruning lost comes back without labels."""

from collections.abc import Iterator
from contextlib import contextmanager

from edgewright.errors import EnvironmentMissing


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
