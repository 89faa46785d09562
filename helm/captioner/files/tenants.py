"""Create the tenants of the chart's values that do not exist. A second run changes nothing.

tenants.json in the same directory is a list of objects with `name` and optionally `plan` and `region`. Keys are created
by hand, because each is printed once. The Job retries while the database is starting.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Look up each tenant and create the missing ones. Return the exit status."""
    for tenant in json.loads(Path(__file__).with_name("tenants.json").read_text()):
        name = tenant.pop("name")
        shown = subprocess.run(["captioner", "tenants", "show", name], capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            print(f"{name} exists", flush=True)
            continue
        flags = [f"--{key}={value}" for key, value in sorted(tenant.items())]
        created = subprocess.run(
            ["captioner", "tenants", "create", name, *flags], capture_output=True, text=True, check=False
        )
        print(created.stdout + created.stderr, end="", flush=True)
        if created.returncode:
            return created.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
