"""A bounded capacity (slots, bytes, threads) that tenants share, and the permits by which they hold parts of it.

Dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", IEEE/ACM
Transactions on Networking 6(2), 1998): the more of the capacity is free, the more of it one tenant may hold.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Self

from serving.errors import Overloaded
from serving.types import NO_TENANT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.types import SchedulingClass

_ALPHA = 8.0
"""Default ratio of what one tenant may hold to what is still free."""


class SharedCapacity:
    """`size` units of one resource, of which a tenant may acquire more while it holds less than its threshold.

    The threshold is `alpha` times the tenant's weight times the free units. With `alpha` 8 one tenant alone gets eight
    ninths of a large capacity; the next tenant gets from the rest, and each gets its share as units are released. A
    smaller `alpha` suits units that are held for days rather than seconds. Work without a tenant may acquire all units.

    `reason` names the resource in `Overloaded` and in `captioner_requests_shed_total`.
    """

    def __init__(self, size: int, *, reason: str = "capacity", alpha: float = _ALPHA) -> None:
        self.size = size
        self.used = 0
        self._reason = reason
        self._alpha = alpha
        self._used_by: defaultdict[str, int] = defaultdict(int)

    @property
    def used_by_tenant(self) -> Mapping[str, int]:
        """Units that each tenant holds."""
        return dict(self._used_by)

    def may_acquire(self, scheduling_class: SchedulingClass, amount: int = 1) -> bool:
        """Return whether the tenant may acquire `amount` units now."""
        free = self.size - self.used
        return amount <= free and within_threshold(
            scheduling_class, self._used_by.get(scheduling_class.tenant, 0), free, self._alpha
        )

    def acquire(self, scheduling_class: SchedulingClass, amount: int = 1) -> Permit:
        """Acquire `amount` units. Raises `Overloaded` if the capacity or the tenant's part of it is used up."""
        permit = Permit(self, scheduling_class)
        permit.grow(amount)
        return permit

    def permit(self, scheduling_class: SchedulingClass) -> Permit:
        """Return a permit for 0 units, to `grow` as the size of the use becomes known."""
        return Permit(self, scheduling_class)

    def recount(self, before: Mapping[str, int], now: Mapping[str, int]) -> None:
        """Correct the units that tenants hold by the difference of two counts made elsewhere."""
        for tenant in before.keys() | now.keys():
            self._add(tenant, now.get(tenant, 0) - before.get(tenant, 0))

    def _grow(self, scheduling_class: SchedulingClass, amount: int) -> None:
        if not self.may_acquire(scheduling_class, amount):
            raise Overloaded(reason=self._reason)
        self._add(scheduling_class.tenant, amount)

    def _add(self, tenant: str, amount: int) -> None:
        self.used += amount
        self._used_by[tenant] += amount
        if not self._used_by[tenant]:
            del self._used_by[tenant]


class Permit:
    """Units of a `SharedCapacity` held for one tenant. A context: leaving it releases them, once."""

    def __init__(self, capacity: SharedCapacity, scheduling_class: SchedulingClass) -> None:
        self.amount = 0
        self._capacity = capacity
        self._class = scheduling_class

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def grow(self, amount: int) -> None:
        """Acquire `amount` more units. Raises `Overloaded`, and then holds as many units as before."""
        self._capacity._grow(self._class, amount)  # noqa: SLF001 - of this module
        self.amount += amount

    def count(self, amount: int) -> None:
        """Hold `amount` more units whether they are free or not, for a resource that is in use already."""
        self._capacity._add(self._class.tenant, amount)  # noqa: SLF001
        self.amount += amount

    def keep(self) -> None:
        """Leave the units in use for good; `SharedCapacity.recount` corrects them later."""
        self.amount = 0

    def release(self) -> None:
        """Release all units. Idempotent."""
        amount, self.amount = self.amount, 0
        self._capacity._add(self._class.tenant, -amount)  # noqa: SLF001


def within_threshold(scheduling_class: SchedulingClass, held: int, free: int, alpha: float = _ALPHA) -> bool:
    """Return whether a tenant that holds `held` units may acquire more while `free` units are free."""
    return free > 0 and (scheduling_class.tenant == NO_TENANT.tenant or held < alpha * scheduling_class.weight * free)
