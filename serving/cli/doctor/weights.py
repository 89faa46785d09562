"""The checkpoint: its files, the disk for them, and the hub that has them. Also the clock, by the hub's answer."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from serving.cli.doctor.findings import Finding, error, ok, warning
from serving.cli.doctor.fit import CHECKPOINT_GIB, GIB, is_captioner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.config import Settings

_TIMEOUT_S = 5.0
_TRUE = ("1", "on", "true", "yes")
_VLLM_TRUE = ("1", "true")
_SKEW_WARNING_S, _SKEW_ERROR_S = 5.0, 60.0
_REFUSED = (401, 403)
_NOT_FOUND = 404


class Hub(NamedTuple):
    """A model hub: its name, the address that answers for a model, its token, and the token's variable."""

    name: str
    url: str
    token: str
    variable: str
    cache: Path


def hub_of(settings: Settings) -> Hub:
    """Return the hub from which vLLM would download the model, by the variables that its libraries read."""
    home = Path.home()
    if os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in _VLLM_TRUE:
        base = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        base = base.removeprefix("https://").rstrip("/")
        token = os.environ.get("MODELSCOPE_API_TOKEN", "")
        cache = Path(os.environ.get("MODELSCOPE_CACHE") or home / ".cache" / "modelscope" / "hub")
        return Hub("ModelScope", f"https://{base}/api/v1/models/{settings.model}", token, "MODELSCOPE_API_TOKEN", cache)
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hf_home = Path(os.environ.get("HF_HOME") or cache_home / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or hf_home / "hub")
    token = os.environ.get("HF_TOKEN", "")
    if not token and (file := Path(os.environ.get("HF_TOKEN_PATH") or hf_home / "token")).is_file():
        token = file.read_text().strip()
    revision = f"/revision/{quote(settings.revision, safe='')}" if settings.revision else ""
    return Hub("Hugging Face", f"{base}/api/models/{settings.model}{revision}", token, "HF_TOKEN", cache)


def probe(settings: Settings) -> Iterator[Finding]:
    """Yield whether the checkpoint is here in full, or can be downloaded and has room."""
    directory = Path(settings.model)
    if directory.is_dir():
        yield from _directory(directory)
        return
    if "://" in settings.model:
        yield ok("weights", "model is in an object store, which is not checked; vLLM reads it with load_format")
        return
    if settings.model.startswith(("/", ".", "~")) or settings.model.count("/") != 1:
        yield error("weights", f"model: the directory {settings.model} does not exist", "set model to a checkpoint")
        return
    hub = hub_of(settings)
    if hub.variable == "MODELSCOPE_API_TOKEN" and importlib.util.find_spec("modelscope") is None:
        message = "VLLM_USE_MODELSCOPE is set, and the package modelscope is not installed"
        yield error("weights", message, "install modelscope, or use the cuda image, which has it")
    offline = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE
    cached = _cached(hub, settings.model)
    if cached is not None:
        yield ok("weights", f"{settings.model} is in the cache, {cached}")
    elif offline:
        yield error(
            "weights",
            f"{settings.model} is not in the cache {hub.cache}, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, or set model to a directory with the checkpoint",
        )
    else:
        yield from _room(settings, hub)
    if not offline:
        yield from _reach(settings, hub, needed=cached is None)


def _directory(directory: Path) -> Iterator[Finding]:
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    index = directory / "model.safetensors.index.json"
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    except (ValueError, LookupError, AttributeError):
        yield error("weights", f"{index} is damaged", "download the checkpoint again")
        return
    missing += [name for name in shards if not (directory / name).is_file()]
    weights = [path for suffix in ("safetensors", "bin", "pt", "gguf") for path in directory.glob(f"*.{suffix}")]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")  # noqa: PLR2004
        yield error("weights", f"{directory} lacks {shown}", "download the checkpoint in full")
    elif not weights:
        yield warning("weights", f"{directory} has no file of weights", "download the checkpoint in full")
    else:
        size = sum(path.stat().st_size for path in weights) / GIB
        yield ok("weights", f"{directory}: {len(weights)} files of weights, {size:.2f} GiB")


def _cached(hub: Hub, model: str) -> Path | None:
    """Return the directory of a complete snapshot in the hub's cache."""
    places = [*hub.cache.glob(f"models--{model.replace('/', '--')}/snapshots/*"), hub.cache / "models" / model]
    for place in (*places, hub.cache / model):
        if any(place.glob("*.safetensors")) and all(found.level == "ok" for found in _directory(place)):
            return place
    return None


def _room(settings: Settings, hub: Hub) -> Iterator[Finding]:
    parent = hub.cache
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free / GIB
    if not is_captioner(settings.model):
        yield ok("weights", f"{free:.1f} GiB free for the download to {hub.cache}; the size of the model is unknown")
    elif free < CHECKPOINT_GIB:
        yield error(
            "weights",
            f"{free:.1f} GiB free in {hub.cache}, and the download needs {CHECKPOINT_GIB}",
            "free space, or set HF_HOME (of ModelScope: MODELSCOPE_CACHE) to a larger disk",
        )
    else:
        yield ok("weights", f"{free:.1f} GiB free in {hub.cache}, the download needs {CHECKPOINT_GIB}")


def _reach(settings: Settings, hub: Hub, *, needed: bool) -> Iterator[Finding]:
    """Yield whether the hub answers for this model, and how far this machine's clock is from the hub's."""
    level = error if needed else warning
    host = hub.url.split("/")[2]
    headers = {"User-Agent": "captioner-doctor"} | ({"Authorization": f"Bearer {hub.token}"} if hub.token else {})
    request = urllib.request.Request(hub.url, headers=headers)  # noqa: S310 - the operator's own hub
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            yield ok("hub", f"{hub.name} ({host}) has {settings.model}")
            yield from clock(answer.headers.get("Date"), host)
    except urllib.error.HTTPError as failure:
        with failure:
            yield level("hub", *_refusal(settings, hub, host, failure.code))
            yield from clock(failure.headers.get("Date"), host)
    except (OSError, http.client.HTTPException) as failure:
        reason = failure.reason if isinstance(failure, urllib.error.URLError) else failure
        yield level("hub", f"{hub.name} ({host}) cannot be reached: {network_reason(reason)}", _WAYS)


_WAYS = (
    "check DNS and egress, set HTTPS_PROXY, or HF_ENDPOINT to a mirror; or set model to a directory with the checkpoint"
)


def _refusal(settings: Settings, hub: Hub, host: str, status: int) -> tuple[str, str]:
    if status in _REFUSED:
        what = f"refused the token of {hub.variable}" if hub.token else f"needs a token for {settings.model}"
        remedy = f"set {hub.variable} to a token that may read {settings.model}, and check the model's name"
        return f"{hub.name} ({host}) {what} (HTTP {status})", remedy
    if status == _NOT_FOUND:
        return (
            f"{hub.name} ({host}) has no model {settings.model} (HTTP 404)",
            "check the name in `model`, and `revision`",
        )
    return f"{hub.name} ({host}) answers HTTP {status}", "try again later, or set HF_ENDPOINT to a mirror"


def network_reason(failure: object) -> str:
    """Return the reason of a failed connection in words without an address's user or password."""
    match failure:
        case socket.gaierror():
            return "its name is not found (DNS)"
        case TimeoutError():
            return f"no answer within {_TIMEOUT_S:g} s"
        case ConnectionRefusedError():
            return "connection refused: no server listens there"
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted ({failure.verify_message})"
        case OSError(strerror=str(reason)):
            return reason
    return type(failure).__name__


def clock(date: str | None, source: str) -> Iterator[Finding]:
    """Yield how far this machine's clock is from the `Date` of an answer."""
    try:
        theirs = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return
    yield skew(time.time() - theirs, source)


def skew(seconds: float, source: str) -> Finding:
    """Return a finding about a difference between this machine's clock and the clock of `source`."""
    text = f"this machine's clock differs by {abs(seconds):.0f} s from {source}"
    remedy = "synchronize the clocks (chrony, systemd-timesyncd): limits, bills and signed addresses use them"
    if abs(seconds) >= _SKEW_ERROR_S:
        return error("clock", text, remedy)
    return warning("clock", text, remedy) if abs(seconds) >= _SKEW_WARNING_S else ok("clock", text)
