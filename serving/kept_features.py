"""Features of a full response that are kept until no other generation can need them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from serving.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serving.scheduling.shared_capacity import Permit
    from serving.types import Features


class KeptFeatures:
    """Features of a full response, for another generation: kept within the bound of `permit`, else released."""

    def __init__(
        self, features: Features, permit: Permit, release: Callable[[], Awaitable[None]], *, keep: bool
    ) -> None:
        self._features: Features | None = features
        self._permit = permit
        self._release = release
        self._keep = keep

    def get(self) -> Features | None:
        """Return the features; `None` once they are released."""
        return self._features

    async def consumed(self) -> None:
        """Keep the features, which an engine has consumed, or release them; after a second engine, release them."""
        if self._keep and self._features is not None and not self._permit.amount:
            with suppress(Overloaded):
                self._permit.grow(self._features.log_mel.nbytes)
                return
        self._features = None
        await self._release()
