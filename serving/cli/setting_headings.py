"""Headings of `captioner serve --help` and of the example file: one per class of `settings.groups`, with an example."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from serving.settings import batch_groups, groups, object_store, operator_groups

if TYPE_CHECKING:
    from pydantic import BaseModel


class Group(NamedTuple):
    """One heading of the help. `example`: a command that uses some of its settings."""

    title: str
    fields: type[BaseModel]
    example: str


_SERVE = "captioner serve"

GROUPS = (
    Group("Settings file", groups.SettingsFile, f"{_SERVE} --config=deploy/profiles/1xh100-80g.toml"),
    Group("Listener", groups.Listener, f"{_SERVE} --host=127.0.0.2 --port=9000"),
    Group("Model", groups.Model, f"{_SERVE} --model=Qwen/Qwen3-Omni-30B-A3B-Captioner"),
    Group("Engine", groups.Engine, f"{_SERVE} --tensor-parallel=2 --dtype=bfloat16 --max-num-seqs=256"),
    Group("Fake engine", groups.FakeEngine, f"{_SERVE} --engine=fake --fake-ttft-s=0.5 --fake-tpot-s=0.02"),
    Group("Request limits", groups.RequestLimits, f"{_SERVE} --max-audio-s=600 --max-url-bytes=256MiB"),
    Group("Capacity", groups.Capacity, f"{_SERVE} --max-concurrent-requests=1024 --max-features-bytes=1GiB"),
    Group("Audio workers", groups.AudioWorkerPool, f"{_SERVE} --audio-workers=8 --audio-timeout-s=30"),
    Group("Downloads", groups.Downloads, f"{_SERVE} --fetch-allow=media.internal:9000,10.1.0.0/16"),
    Group("Responses", groups.Responses, f"{_SERVE} --stream-timeout-s=1200 --heartbeat-s=10"),
    Group("Cluster", groups.Cluster, "captioner cluster --engine-on-gpu --max-engine-replicas=4"),
    Group("Callers", groups.Callers, f'CAPTIONER_API_KEYS="$(cat keys)" {_SERVE} --region=singapore'),
    Group("Storage and usage", groups.Storage, f"{_SERVE} --data-dir=/var/lib/captioner --max-uploads-bytes=50GiB"),
    Group("Object store", object_store.ObjectStore, f"{_SERVE} --object-store-url=s3://captions/production"),
    Group(
        "Files and batches", batch_groups.FilesAndBatches, f"{_SERVE} --max-files-bytes=200GiB --max-batch-lines=128"
    ),
    Group("Logs", operator_groups.Logs, f"{_SERVE} --log-format=text --log-level=debug"),
    Group(
        "Administration",
        operator_groups.AdministrationApi,
        f'CAPTIONER_ADMIN_TOKEN="$(cat admin-token)" {_SERVE} --admin-port=8100',
    ),
    Group(
        "Metrics and traces",
        operator_groups.MetricsAndTraces,
        f"{_SERVE} --otlp-endpoint=http://collector:4318 --trace-ratio=0.1",
    ),
)
