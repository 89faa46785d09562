"""Make the tenants of the chart's values that are not there. Run again it changes nothing.

Beside it stands tenants.json: a list of `name`, and if wanted `plan` and `region`. Keys are made by hand, as they are
shown once. The database may still be starting: the Job tries again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Ask for each tenant, and create what is missing; return the exit status."""
    for tenant in json.loads(Path(__file__).with_name("tenants.json").read_text()):
        name = tenant.pop("name")
        shown = subprocess.run(["captioner", "tenants", "show", name], capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            print(f"{name} is there", flush=True)
            continue
        flags = [f"--{key}={value}" for key, value in sorted(tenant.items())]
        made = subprocess.run(
            ["captioner", "tenants", "create", name, *flags], capture_output=True, text=True, check=False
        )
        print(made.stdout + made.stderr, end="", flush=True)
        if made.returncode:
            return made.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
