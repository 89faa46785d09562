"""The administrators' page, used as they use it, in real Chromium; failures as in `test_page`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.page.conftest import Browser

KEY = re.compile(r"sk-[\w-]{43}")


def test_tenants_and_keys(browser: Browser) -> None:
    """Tenants and keys are made, suspended, rotated and revoked, each change after a question and in the audit log."""
    seen = browser.run("administer")
    assert seen["wrong"] == "The admin token is missing or wrong."
    assert KEY.fullmatch(seen["secret"])
    assert KEY.fullmatch(seen["rotated"])
    assert seen["secret"] != seen["rotated"]
    assert re.fullmatch(r"umbrella, key-[0-9a-f]{12}", seen["of"])
    assert seen["focused"] == "confirm-no"
    assert seen["kept"][:7] == ["umbrella", "Umbrella", "standard", "beijing", "active", "0", "0"]
    assert seen["suspended"][4] == "suspended"
    assert len(seen["keys"]) == 2
    assert ["revoked" in row for row in seen["keys"]] == [False, True]
    changes = [re.search(r"api:ada([a-z.]+)", row) for row in seen["audit"]]
    assert [found[1] if found else "" for found in changes][:4] == [
        "keys.revokekey",
        "keys.rotatekey",
        "tenants.setumbrella",
        "keys.createumbrella",
    ]
    assert (seen["left"], seen["tenants"]) == (0, False)


def test_a_phone_in_chinese(browser: Browser) -> None:
    """Nothing is wider than 360 px, in the dark and in Chinese."""
    heads = browser.run("administer_phone")
    assert heads[2:] == ["本月用量", "租户", "acme 的 Key", "最近的更改", ""]
