"""Connections that the network policies allow and deny."""

from __future__ import annotations

import ipaddress
from itertools import product
from typing import TYPE_CHECKING

import pytest

from serving.settings.types import METRICS_PORTS
from tests.chart.combinations import COMBINATIONS
from tests.chart.network import End, Network
from tests.chart.rendering import PROFILES, pod_templates, serve_config, template

if TYPE_CHECKING:
    from pathlib import Path


def pod(component: str, release: str = "x") -> End:
    """Return a pod of the chart as an end of a connection."""
    labels = {"app.kubernetes.io/name": "captioner", "app.kubernetes.io/instance": release}
    return End(labels | {"app.kubernetes.io/component": component})


RAY = ("head", "frontend", "engine")
OURS = (*RAY, "admin", "tenants", "model", "postgresql", "redis", "backup", "test")
CALLER = End({"app": "web"}, "shop")
DNS = End({"k8s-app": "kube-dns"}, "kube-system")
OPERATOR = End({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")
PROMETHEUS = End({"app.kubernetes.io/name": "prometheus"}, "monitoring")
API = End(address="10.96.0.1")
WEB = End(address="93.184.216.34")
WEB6 = End(address="2606:2800:220:1::1")
METADATA = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", "192.0.0.192")
PRIVATE = (
    "10.0.0.1",
    "172.20.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "127.0.0.1",
    "0.0.0.1",
    "224.0.0.1",
    "fd12::1",
    "fe80::1",
    "::1",
    "64:ff9b::a00:1",
)


@pytest.fixture(scope="module")
def network(helm: Path) -> Network:
    """Policies of a release with monitoring, administration, and the model in a claim."""
    claim = {"model": {"source": "pvc"}}
    return Network(template(helm, COMBINATIONS["monitoring"] | COMBINATIONS["administration"] | claim))


def test_every_pod_is_denied_by_default(helm: Path) -> None:
    """The deny policy selects every pod of the chart by its labels, with every profile."""
    for values, profile in product([COMBINATIONS["administration"]], PROFILES):
        manifests = template(helm, values, profile)
        network = Network(manifests)
        for who, each in pod_templates(manifests):
            end = End(each["metadata"]["labels"])
            assert not network.allows(end, End({"app": "other"}), 80), who
            assert not network.allows(End({"app": "other"}), end, 22), who


def test_callers_reach_the_service_and_nothing_else(network: Network) -> None:
    """They reach port 8000 of the pods that Ray's Service selects, no other port and no other pod."""
    reached = {
        (name, port)
        for name in OURS
        for port in (8000, 8265, 10001, 6379, 5432, 52365, 8100, 9464, 8080, 30000)
        if network.allows(CALLER, pod(name), port)
    }
    assert reached == {("frontend", 8000), ("engine", 8000)}


def test_only_frontends_reach_the_bucket(helm: Path) -> None:
    """Frontends reach the networks of the object store on its port; no other pod does."""
    store = COMBINATIONS["uploads in a bucket"]["objectStore"] | {"port": 9000}
    network, bucket = Network(template(helm, {"objectStore": store})), End(address="10.5.0.1")
    reached = {(name, port) for name in OURS for port in (80, 9000) if network.allows(pod(name), bucket, port)}
    assert reached == {("frontend", 9000)}


def test_names_are_resolved_by_the_cluster_alone(network: Network) -> None:
    """Every pod reaches the cluster's DNS, and no other."""
    for name, protocol in product(OURS, ("UDP", "TCP")):
        assert network.allows(pod(name), DNS, 53, protocol)
        assert not network.allows(pod(name), End(address="8.8.8.8"), 53, protocol)


def test_names_are_resolved_by_another_dns(helm: Path) -> None:
    """With the values of OpenShift and of a cache on each node, pods reach those, on their ports, and no other."""
    network = Network(template(helm, COMBINATIONS["DNS of OpenShift and of the node"]))
    for name, protocol in product(OURS, ("UDP", "TCP")):
        assert network.allows(pod(name), End({"dns": "default"}, "openshift-dns"), 5353, protocol)
        assert network.allows(pod(name), End(address="169.254.20.10"), 53, protocol)
        assert not network.allows(pod(name), DNS, 53, protocol)
        assert not network.allows(pod(name), End(address="169.254.169.254"), 53, protocol)


def test_frontends_download_from_public_addresses_only(network: Network) -> None:
    """On the download ports they reach no private range and no cloud's metadata."""
    for web, port in product((WEB, WEB6), (80, 443, 8000, 8080, 8443)):
        assert network.allows(pod("frontend"), web, port)
    assert not network.allows(pod("frontend"), WEB, 22)
    for address, port in product((*METADATA, *PRIVATE), (80, 443, 8000, 8080, 8443)):
        assert not network.allows(pod("frontend"), End(address=address), port), address
    for name in set(OURS) - {"frontend", "model"}:
        assert not network.allows(pod(name), WEB, 443), name
        assert not network.allows(pod(name), End(address="169.254.169.254"), 80), name


def test_only_the_downloading_pod_reaches_the_model_source(helm: Path, network: Network) -> None:
    """The Job does, or the engine whose pod downloads; private addresses only if named."""
    assert network.allows(pod("model"), WEB, 443)
    assert not network.allows(pod("model"), End(address="169.254.169.254"), 443)
    for name in ("defaults", "a copy of the model for each node"):
        loading = Network(template(helm, COMBINATIONS[name]))
        assert {each for each in OURS if loading.allows(pod(each), WEB, 443)} == {"frontend", "engine"}
        assert not loading.allows(pod("engine"), End(address="169.254.169.254"), 443)
    store = Network(template(helm, COMBINATIONS["model from an object store"]))
    assert store.allows(pod("engine"), End({}, "minio"), 9000) is False  # another label
    named = {"networkPolicy": {"modelSource": [{"ipBlock": {"cidr": "10.9.0.0/16"}}], "modelPort": 9000}}
    store = Network(template(helm, COMBINATIONS["model from an object store"] | named))
    assert store.allows(pod("engine"), End(address="10.9.0.1"), 9000)
    assert not store.allows(pod("engine"), WEB, 443)


def test_the_test_reaches_its_url(helm: Path, network: Network) -> None:
    """It reaches the serving pods; with a URL, pods of a proxy, or any address on the URL's port."""
    gateway = End({"app": "gateway"}, "gateways")
    assert network.allows(pod("test"), pod("frontend"), 8000)
    assert not network.allows(pod("test"), gateway, 8080)
    assert not network.allows(pod("test"), WEB, 443)
    for url, port in (("https://c.example.com", 443), ("http://10.0.0.1", 80), ("http://c.example.com:8443/x", 8443)):
        elsewhere = Network(template(helm, {"test": {"url": url}}))
        assert elsewhere.allows(pod("test"), gateway, 8080)
        for address in ("93.184.216.34", "2606:2800:220:1::1", "10.0.0.1"):
            for each in (80, 443, 8443):
                assert elsewhere.allows(pod("test"), End(address=address), each) == (each == port)
        assert not any(elsewhere.allows(pod("test"), End(address=each), port) for each in METADATA)
        assert not elsewhere.allows(pod("test"), pod("redis"), 6379)
        assert not elsewhere.allows(pod("frontend"), WEB, 22)


def test_stores_are_reached_by_their_users_alone(network: Network) -> None:
    """Frontends, administration and the tenants Job reach both stores, Ray's head only Redis, engines neither."""
    users = {
        "postgresql": {"frontend", "admin", "tenants", "backup"},
        "redis": {"frontend", "admin", "tenants", "head"},
    }
    for store, port in (("postgresql", 5432), ("redis", 6379)):
        assert {name for name in OURS if network.allows(pod(name), pod(store), port)} == users[store]
        for stranger in (CALLER, PROMETHEUS, pod("frontend", release="other")):
            assert not network.allows(stranger, pod(store), port)
        assert not any(network.allows(pod(store), pod(name), 8000) for name in OURS)


def test_external_stores_are_reached_in_their_networks(helm: Path) -> None:
    """They are reached on their ports; other private addresses stay closed."""
    network = Network(template(helm, COMBINATIONS["external stores"]))
    assert network.allows(pod("frontend"), End(address="10.3.0.9"), 5432)
    assert network.allows(pod("head"), End(address="10.4.0.9"), 6380)
    assert not network.allows(pod("frontend"), End(address="10.3.0.9"), 6380)
    assert not network.allows(pod("frontend"), End(address="10.5.0.9"), 5432)
    assert not network.allows(pod("engine"), End(address="10.3.0.9"), 5432)


def test_ray_processes_reach_each_other_within_a_release(network: Network) -> None:
    """They reach each other on any port; processes of another release on none."""
    for one, other, port in product(RAY, RAY, (6379, 10002, 30000, 65000)):
        assert network.allows(pod(one), pod(other), port)
        assert not network.allows(pod(one, release="other"), pod(other), port)


def test_the_operator_and_the_autoscaler_work(network: Network) -> None:
    """KubeRay reaches the head's dashboard and proxy, and only the head reaches the Kubernetes API."""
    assert all(network.allows(OPERATOR, pod("head"), port) for port in (8265, 52365, 8000))
    assert not network.allows(OPERATOR, pod("engine"), 8265)
    assert network.allows(pod("head"), API, 443)
    assert network.allows(pod("head"), End(address="10.0.0.1"), 6443)
    assert not any(network.allows(pod(name), API, 443) for name in set(OURS) - {"head"})


@pytest.mark.parametrize("name", ["defaults", "monitoring"])
def test_prometheus_reaches_only_metrics(helm: Path, name: str) -> None:
    """It reaches Ray, HAProxy, and each port that a frontend or engine may use, with and without a PodMonitor."""
    values = COMBINATIONS[name] | {"networkPolicy": {"callers": [{"podSelector": {"matchLabels": {"app": "web"}}}]}}
    manifests = template(helm, values)
    network, first = Network(manifests), serve_config(manifests)["applications"][0]["args"]["metrics_port"]
    ports = (8080, 9101, *range(first, first + METRICS_PORTS))
    for who, port in product(RAY, ports):
        assert network.allows(PROMETHEUS, pod(who), port)
        assert not network.allows(CALLER, pod(who), port)
    for port in (8265, 6379, ports[-1] + 1):
        assert not any(network.allows(PROMETHEUS, pod(who), port) for who in OURS)
    # `/metrics/targets` is at the pods that Ray's Service selects, even if callers are restricted.
    assert {who for who in OURS if network.allows(PROMETHEUS, pod(who), 8000)} == {"frontend", "engine"}


def test_traces_reach_only_the_collector(helm: Path) -> None:
    """Frontends and engines reach it on its port; without `traces.to` no pod does."""
    collector = End({"app": "collector"}, "tracing")
    traced = COMBINATIONS["settings of every kind"]
    for values, tracing in ((traced, {"frontend", "engine"}), (traced | COMBINATIONS["without Ray"], {"frontend"})):
        network = Network(template(helm, values))
        assert {who for who in OURS if network.allows(pod(who), collector, 4318)} == tracing
        assert not any(network.allows(pod(who), collector, 4317) for who in OURS)
    network = Network(template(helm))
    assert not any(network.allows(pod(who), collector, 4318) for who in OURS)


def test_only_named_peers_reach_the_administration(helm: Path, network: Network) -> None:
    """By default there is no administration; if enabled, only named peers reach it."""
    assert not any("admin" in each["metadata"]["name"] for each in template(helm))
    assert not network.allows(CALLER, pod("admin"), 8100)
    nobody = Network(template(helm, COMBINATIONS["administration for nobody"]))
    ops = {"admin": {"enabled": True, "from": [{"podSelector": {"matchLabels": {"app": "ops"}}}]}}
    named = Network(template(helm, ops))
    assert named.allows(End({"app": "ops"}), pod("admin"), 8100)
    for who in (CALLER, End({"app": "ops"}), PROMETHEUS, *map(pod, OURS)):
        assert not nobody.allows(who, pod("admin"), 8100)
        assert who == End({"app": "ops"}) or not named.allows(who, pod("admin"), 8100)
    for manifest in template(helm, ops | COMBINATIONS["an Ingress"]):
        if manifest["kind"] == "Ingress":
            assert "admin" not in str(manifest)


def test_an_empty_list_means_nobody(helm: Path) -> None:
    """An empty list of peers in the values denies everybody, although it would allow everybody in a NetworkPolicy."""
    closed = {
        "networkPolicy": {"callers": [], "operator": [], "prometheus": [], "kubernetesApi": [], "dns": {"to": []}}
    }
    network = Network(template(helm, closed | {"monitoring": {"podMonitor": {"enabled": True}}}))
    for who, name, port in product((CALLER, OPERATOR, PROMETHEUS, WEB), OURS, (8000, 8265, 8080, 9101, 9464)):
        assert not network.allows(who, pod(name), port)
    assert network.allows(pod("test"), pod("frontend"), 8000)
    assert not network.allows(pod("head"), API, 443)
    assert not network.allows(pod("frontend"), DNS, 53, "UDP")


def test_without_ray_the_same_holds(helm: Path) -> None:
    """The only component accepts callers and downloads audio."""
    network = Network(template(helm, COMBINATIONS["without Ray"]))
    assert network.allows(CALLER, pod("frontend"), 8000)
    assert network.allows(pod("frontend"), WEB, 443)
    assert network.allows(pod("frontend"), pod("redis"), 6379)
    assert not network.allows(pod("frontend"), End(address="169.254.169.254"), 80)
    assert not network.allows(CALLER, pod("redis"), 6379)


def test_networks_are_valid_for_kubernetes(helm: Path) -> None:
    """Networks have no host bits, and exceptions are subnets of their network."""
    for manifest in template(helm):
        if manifest["kind"] != "NetworkPolicy":
            continue
        for rule in [*manifest["spec"].get("egress", []), *manifest["spec"].get("ingress", [])]:
            for peer in [*rule.get("to", []), *rule.get("from", [])]:
                if block := peer.get("ipBlock"):
                    network = ipaddress.ip_network(block["cidr"])
                    for each in block.get("except", []):
                        assert ipaddress.ip_network(each).subnet_of(network)  # type: ignore[arg-type]
