"""Requests that make no caption but cost something: each counts as one of the caller's requests per minute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serving.types import Limits

if TYPE_CHECKING:
    from serving.tenancy.usage_session import UsageSessions
    from serving.types import Caller


@dataclass(frozen=True, slots=True)
class RequestCounter:
    """The limits of callers, as far as they count requests."""

    usage_sessions: UsageSessions

    async def count(self, caller: Caller) -> None:
        """Count one request of the caller. Raises `RequestsLimited` and `BurstLimited`.

        Running captions and spent budgets refuse no such request: a list of models costs no token, and a policy is
        asked for before the caption.
        """
        if not self.usage_sessions.metering:
            return
        limiter = self.usage_sessions.limiter
        requests_only = replace(
            caller,
            tenant_limits=_requests_per_minute(caller.tenant_limits),
            key_limits=_requests_per_minute(caller.key_limits),
            free_quota=None,
        )
        await limiter.settle(await limiter.admit(requests_only), tokens=0, nanos=0)


def _requests_per_minute(limits: Limits) -> Limits:
    return Limits(requests_per_minute=limits.requests_per_minute)
