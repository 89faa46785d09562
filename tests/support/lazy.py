"""Modules that are imported at their first use: every run collects all tests, and few of them need PyTorch (4 s)."""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Stand-in of a module, under whose name a test file has it. A test that uses it imports the module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # pytest looks at each name of a test file
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
