"""A `kubectl` that runs the Jobs of the chart's CronJobs with the programs of this machine."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chart.rendering import only, pod_templates

if TYPE_CHECKING:
    from tests.chart.rendering import Manifest

KUBECTL = r"""#!PYTHON
import json, os, pathlib, subprocess, sys

HERE = pathlib.Path("HERE")


def run(job):
    log, status = "", 0
    for container in json.loads((HERE / f"{job['cron']}.json").read_text()):
        env = os.environ | container["env"] | {k: v for k, v in job["env"].items() if k in container["env"]}
        done = subprocess.run(container["command"], env=env, capture_output=True, text=True)
        log, status = log + done.stdout + done.stderr, done.returncode
        if status:
            break
    (HERE / f"job-{job['name']}").write_text(json.dumps({"log": log, "status": status}))


match sys.argv[3:]:  # after --namespace captioner
    case ["create", "job", name, source, *rest]:
        job = {"name": name, "cron": source.removeprefix("--from=cronjob/"), "env": {}}
        print(json.dumps(job)) if "--dry-run=client" in rest else run(job)
    case ["set", "env", "--local", "-f", "-", pair, "-o", "yaml"]:
        job = json.load(sys.stdin)
        job["env"] |= dict([pair.split("=", 1)])
        print(json.dumps(job))
    case ["apply", "-f", "-"]:
        run(json.load(sys.stdin))
    case ["wait", "--for=condition=Complete", job, _]:
        sys.exit(json.loads((HERE / job.replace("/", "-")).read_text())["status"])
    case ["logs", job]:
        print(json.loads((HERE / job.replace("/", "-")).read_text())["log"])
    case ["delete", "job", name]:
        (HERE / f"job-{name}").unlink()
    case other:
        sys.exit(f"not known here: {other}")
"""


def write_kubectl(directory: Path, manifests: list[Manifest], database: str, **paths: Path) -> None:
    """Write a `kubectl` into `directory` that knows the CronJobs of a release named `captioner`.

    The containers have their commands, scripts and variables; the address of the database is `database`, and a variable
    whose value is a path of the container is replaced by that of `paths`.
    """
    scripts = only(manifests, "ConfigMap", "captioner-backup")["data"]
    for name, script in scripts.items():
        (directory / name).write_text(script)
    for who, template in pod_templates(manifests):
        kind, _, name = who.partition(" ")
        if kind != "CronJob":
            continue
        spec = template["spec"]
        containers = [
            {
                "command": [part.replace("/etc/captioner", str(directory)) for part in each["command"]],
                "env": {
                    variable["name"]: _local(variable, database, paths)
                    for variable in each["env"]
                    if "value" in variable
                },
            }
            for each in [*spec.get("initContainers", []), *spec["containers"]]
        ]
        (directory / f"{name}.json").write_text(json.dumps(containers))
    program = directory / "kubectl"
    program.write_text(KUBECTL.replace("PYTHON", sys.executable, 1).replace('"HERE"', repr(str(directory))))
    program.chmod(0o755)


def _local(variable: Manifest, database: str, paths: dict[str, Path]) -> str:
    """Return a variable's value on this machine."""
    value = str(variable["value"])
    if variable["name"] == "CAPTIONER_DATABASE_URL":
        assert re.fullmatch(r"postgresql\+psycopg://captioner:\$\(DATABASE_PASSWORD\)@[^/]+/captioner", value)
        return database
    return str(paths.get(variable["name"], value))


def environment(directory: Path) -> dict[str, str]:
    """Return this process's variables, with the programs of `directory` first."""
    return os.environ | {"PATH": f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
