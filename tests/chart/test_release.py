"""Life of a release: Helm 4 against an in-memory Kubernetes API that validates like a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tests.chart.rendering import CHART, REQUIRED, ROOT, crd_files
from tests.cluster.running import free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMESPACE = "default"
FAKE_API = Path(os.environ.get("FAKE_KUBE_API", ROOT.parent / "shared" / "tools" / "fake_kube_api.py"))
"""Program that serves the Kubernetes API in memory: arguments are a port and files of CRDs. Not in this repository."""


class Api:
    """In-memory Kubernetes API, and Helm configured for it."""

    def __init__(self, helm: Path, directory: Path) -> None:
        self._helm = helm
        self.url = f"http://127.0.0.1:{free_port()}"
        self._config = directory / "kubeconfig"
        self._config.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                    "users": [{"name": "u", "user": {}}],
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
                    "current-context": "c",
                }
            )
        )
        self._home = directory

    def helm(self, *arguments: str, fails: bool = False) -> str:
        """Run a Helm command; return its output."""
        environment = {"KUBECONFIG": str(self._config), "HOME": str(self._home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [self._helm, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def get(self, path: str) -> Any:
        """Return an object or a list."""
        return httpx.get(self.url + path, timeout=10).raise_for_status().json()

    def rayservice(self) -> Any:
        """Return the release's RayService."""
        return self.get(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices/captioner")

    def secret(self) -> Any:
        """Return the data of the chart's Secret."""
        return self.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/captioner")["data"]

    def provision(self) -> None:
        """Bind claims and assign Services an address, as a cluster does and this API does not."""
        path = f"/api/v1/namespaces/{NAMESPACE}"
        for claim in self.get(f"{path}/persistentvolumeclaims")["items"]:
            if claim.get("status", {}).get("phase") != "Bound":
                self._patch(
                    f"{path}/persistentvolumeclaims/{claim['metadata']['name']}", {"status": {"phase": "Bound"}}
                )
        for service in self.get(f"{path}/services")["items"]:
            if not service["spec"].get("clusterIP"):
                self._patch(f"{path}/services/{service['metadata']['name']}", {"spec": {"clusterIP": "10.96.0.9"}})

    def _patch(self, path: str, change: dict[str, Any]) -> None:
        headers = {"content-type": "application/merge-patch+json"}
        httpx.patch(self.url + path, content=json.dumps(change), headers=headers, timeout=10).raise_for_status()

    def up(self) -> bool:
        """Return whether the API answers."""
        with suppress(httpx.TransportError):
            self.get("/version")
            return True
        return False


@pytest.fixture(scope="module")
def api(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One API for all tests of this module, which build on each other."""
    api = Api(helm, tmp_path_factory.mktemp("api"))
    if not FAKE_API.exists():
        pytest.skip("the in-memory Kubernetes API is not here: set FAKE_KUBE_API to its program")
    command = [sys.executable, FAKE_API, api.url.rpartition(":")[2]]
    with subprocess.Popen(
        [str(each) for each in (*command, *crd_files())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until(api.up, 60)
            ended = threading.Event()

            def cluster() -> None:
                while not ended.wait(0.3):
                    with suppress(httpx.HTTPStatusError):  # gone since it was listed
                        api.provision()

            provisioning = threading.Thread(target=cluster)
            provisioning.start()
            yield api
            ended.set()
            provisioning.join()
        finally:
            process.kill()


CHART_AND_PROFILE = (
    *(str(CHART), "--values", str(CHART / "profiles" / "1xh100-80g.yaml")),
    *("--values", str(REQUIRED), "--set=model.source=pvc"),
)
WAIT = ("--wait=legacy", "--timeout=60s")


def test_the_life_of_a_release(api: Api) -> None:
    """Install, upgrade, automatic and manual rollback, test and uninstall leave the expected objects."""
    notes = api.helm("install", "captioner", *CHART_AND_PROFILE, *WAIT)
    assert "captioner-serve-svc" in notes
    first, secrets = api.rayservice(), api.secret()
    assert first["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] == 4
    assert set(secrets) == {
        "upload-secret",
        "key-pepper",
        "admin-token",
        "metrics-token",
        "database-password",
        "redis-password",
        "api-keys",
    }

    api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--set=settings.max_num_seqs=128")
    second = api.rayservice()
    assert "max_num_seqs: 128" in second["spec"]["serveConfigV2"]
    assert api.secret() == secrets  # otherwise uploads, keys and passwords would be invalid
    assert second["spec"]["rayClusterConfig"] == first["spec"]["rayClusterConfig"]  # a setting starts no new cluster

    bad = '--set-json=frontend.volumes=[{"name": "x", "configMap": {"nome": "typo"}}]'
    output = api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--rollback-on-failure", bad, fails=True)
    assert "nome" in output
    assert api.rayservice()["spec"] == second["spec"]
    assert "deployed" in api.helm("status", "captioner")

    tenants = '--set-json=tenants.list=[{"name": "acme", "plan": "standard"}]'
    api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--set=engine.replicas.max=2", tenants)
    assert api.get(f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs/captioner-tenants")["status"]["succeeded"] == 1
    assert api.rayservice()["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] == 2
    api.helm("rollback", "captioner", "1", *WAIT)
    assert api.rayservice()["spec"] == first["spec"]
    assert api.secret() == secrets

    for _ in range(2):  # the test is repeatable
        assert "Succeeded" in api.helm("test", "captioner", "--logs")
        # Helm 3 needs the pod for its logs; this API has logs for any name.
        assert api.get(f"/api/v1/namespaces/{NAMESPACE}/pods/captioner-test")

    api.helm("uninstall", "captioner", *WAIT)
    kinds = ("configmaps", "services", "serviceaccounts", "persistentvolumeclaims", "secrets")
    left = {
        f"{kind}/{each['metadata']['name']}"
        for kind in kinds
        for each in api.get(f"/api/v1/namespaces/{NAMESPACE}/{kind}")["items"]
    }
    hooks = {name for name in left if name.endswith(("-tenants", "-test"))}
    # Weights, backups and secrets are kept, as documented in the values.
    kept = {"persistentvolumeclaims/captioner-model", "persistentvolumeclaims/captioner-backups", "secrets/captioner"}
    assert left - hooks == kept
    assert not api.get(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices")["items"]


def test_a_second_install_reuses_the_secrets(api: Api) -> None:
    """It keeps the first install's Secret, because the database's volume has its password, and keys no longer used."""
    secrets = api.secret()
    api.helm("install", "captioner", *CHART_AND_PROFILE, *WAIT, "--take-ownership")
    assert api.secret() == secrets
    # Pods of an old cluster that start later still need the token.
    api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--set=monitoring.token=false")
    assert api.secret() == secrets
    api.helm("uninstall", "captioner", *WAIT)


def test_the_life_of_a_release_without_ray(api: Api) -> None:
    """Install, upgrade, test and uninstall work with Helm's `--wait`, which supports Deployments."""
    profile = (
        *(str(CHART), "--values", str(CHART / "profiles" / "cpu-embedded.yaml")),
        *("--set=workload=deployment", "--set=image.pullPolicy=Never"),
    )
    api.helm("install", "solo", *profile, "--wait", "--timeout=60s")
    api.helm("upgrade", "solo", *profile, "--wait", "--timeout=60s", "--set=settings.log_level=debug")
    assert "Succeeded" in api.helm("test", "solo")
    api.helm("uninstall", "solo", "--wait", "--timeout=60s")
