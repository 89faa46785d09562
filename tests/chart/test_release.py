"""Helm 4 against a Kubernetes API in memory that refuses what a real one would: the life of a release."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from tests.chart.rendering import CHART, shared
from tests.cluster.running import free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMESPACE = "default"


class Api:
    """The API, and Helm pointed at it."""

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
        """Run a command; return what it told."""
        environment = {"KUBECONFIG": str(self._config), "HOME": str(self._home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [self._helm, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def get(self, path: str) -> Any:
        """An object or a list."""
        return httpx.get(self.url + path, timeout=10).raise_for_status().json()

    def rayservice(self) -> Any:
        """The release's."""
        return self.get(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices/captioner")

    def secret(self) -> Any:
        """The chart's own, without what the server adds."""
        return self.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/captioner")["data"]

    def give(self) -> None:
        """What a cluster gives, and this API does not: volumes to claims, addresses to Services."""
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
        """Whether it answers."""
        with suppress(httpx.TransportError):
            self.get("/version")
            return True
        return False


@pytest.fixture(scope="module")
def api(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One for all steps, which follow each other."""
    api = Api(helm, tmp_path_factory.mktemp("api"))
    command = [sys.executable, shared("tools/fake_kube_api.py"), api.url.rpartition(":")[2]]
    crds = sorted(shared("crds").glob("*.yaml"))
    with subprocess.Popen(
        [*map(str, command), *map(str, crds)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until(api.up, 60)
            ended = threading.Event()

            def cluster() -> None:
                while not ended.wait(0.3):
                    with suppress(httpx.HTTPStatusError):  # gone since it was listed
                        api.give()

            giving = threading.Thread(target=cluster)
            giving.start()
            yield api
            ended.set()
            giving.join()
        finally:
            process.kill()


CHART_AND_PROFILE = (str(CHART), "--values", str(CHART / "profiles" / "1xh100-80g.yaml"))
WAIT = ("--wait=legacy", "--timeout=60s")


def test_the_life_of_a_release(api: Api) -> None:
    """Installed, upgraded, a bad upgrade rolled back by itself, rolled back by hand, tested, uninstalled."""
    told = api.helm("install", "captioner", *CHART_AND_PROFILE, *WAIT)
    assert "captioner-serve-svc" in told  # NOTES tell where it answers
    first, secrets = api.rayservice(), api.secret()
    assert first["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] == 4
    assert set(secrets) == {
        "upload-secret",
        "key-pepper",
        "admin-token",
        "database-password",
        "redis-password",
        "api-keys",
    }

    api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--set=settings.max_num_seqs=128")
    second = api.rayservice()
    assert "max_num_seqs: 128" in second["spec"]["serveConfigV2"]
    assert api.secret() == secrets  # else uploads, keys and passwords would be void
    assert second["spec"]["rayClusterConfig"] == first["spec"]["rayClusterConfig"]  # a setting makes no new cluster

    bad = '--set-json=frontend.volumes=[{"name": "x", "configMap": {"nome": "typo"}}]'
    told = api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--rollback-on-failure", bad, fails=True)
    assert "nome" in told
    assert api.rayservice()["spec"] == second["spec"]
    assert "deployed" in api.helm("status", "captioner")

    tenants = '--set-json=tenants.list=[{"name": "acme", "plan": "standard"}]'
    api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--set=engine.replicas.max=2", tenants)
    assert api.get(f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs/captioner-tenants")["status"]["succeeded"] == 1
    assert api.rayservice()["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] == 2
    api.helm("rollback", "captioner", "1", *WAIT)
    assert api.rayservice()["spec"] == first["spec"]
    assert api.secret() == secrets

    for _ in range(2):  # it may be run again
        assert "Succeeded" in api.helm("test", "captioner", "--logs")
        # Else Helm 3 finds no logs. This API has some for any name.
        assert api.get(f"/api/v1/namespaces/{NAMESPACE}/pods/captioner-test")

    api.helm("uninstall", "captioner", *WAIT)
    kinds = ("configmaps", "services", "serviceaccounts", "persistentvolumeclaims", "secrets")
    left = {
        f"{kind}/{each['metadata']['name']}"
        for kind in kinds
        for each in api.get(f"/api/v1/namespaces/{NAMESPACE}/{kind}")["items"]
    }
    hooks = {name for name in left if name.endswith(("-tenants", "-test"))}
    # The weights and what signs and opens is kept, as the values say.
    assert left - hooks == {"persistentvolumeclaims/captioner-model", "secrets/captioner"}
    assert not api.get(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices")["items"]


def test_a_second_install_goes_on_with_the_secrets(api: Api) -> None:
    """What the first left is taken over: the database's volume knows its password. What is made later stays, too."""
    secrets = api.secret()
    api.helm("install", "captioner", *CHART_AND_PROFILE, *WAIT, "--take-ownership")
    assert api.secret() == secrets
    api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT, "--set=monitoring.token=true")
    more = api.secret()
    assert more == secrets | {"metrics-token": more["metrics-token"]}
    api.helm("upgrade", "captioner", *CHART_AND_PROFILE, *WAIT)
    assert api.secret() == more
    api.helm("uninstall", "captioner", *WAIT)


def test_a_release_without_ray_lives_too(api: Api) -> None:
    """With Helm's own waiting, which knows Deployments."""
    profile = (str(CHART), "--values", str(CHART / "profiles" / "cpu-embedded.yaml"), "--set=workload=deployment")
    api.helm("install", "solo", *profile, "--wait", "--timeout=60s")
    api.helm("upgrade", "solo", *profile, "--wait", "--timeout=60s", "--set=settings.log_level=debug")
    assert "Succeeded" in api.helm("test", "solo")
    api.helm("uninstall", "solo", "--wait", "--timeout=60s")
