"""The API manual's own samples, run unchanged but for hosts, the key and placeholder paths."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from tests.sdk.clients import node_script
from tests.sdk.environments import HERE, bare_variables, python_environment
from tests.support.wire import ask_native, data_url, events

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sdk.tap import Tap
    from tests.support.media import MediaServer
    from tests.support.service import RunningService

SAMPLES = HERE / "samples"
PLACEHOLDER = "SUQzBAAAAAAAI1RTU0UAAAAPAAADTGF2ZjU4LjI5...."
ON_THE_WEB = "file-manage-files/zh-CN/20240916/xvappi/装修噪音.wav"

REPAIRS = {
    # The manual lacks an import, and a comma (PROTOCOL 14, no. 7).
    "python-dashscope-file": [("import dashscope\n", "import dashscope\nimport os\n")],
    "python-dashscope-base64": [('os.getenv("DASHSCOPE_API_KEY")\n', 'os.getenv("DASHSCOPE_API_KEY"),\n')],
}


@dataclass(frozen=True)
class Manual:
    """The values that fill in the samples, and the output expected of them."""

    service_origin: str
    media_origin: str
    clip: Path
    caption: str

    def sample(self, name: str) -> str:
        """Return the sample's text for this service and this clip."""
        text = (SAMPLES / f"{name}.txt").read_text()
        for old, new in (
            *REPAIRS.get(name, ()),
            ("# dashscope.base_http_api_url", "dashscope.base_http_api_url"),
            ("https://dashscope-intl.aliyuncs.com", self.service_origin),
            ("https://dashscope.aliyuncs.com", self.service_origin),
            ("https://help-static-aliyun-doc.aliyuncs.com", self.media_origin),
            ("xxx/ABSOLUTE_PATH/", "ABSOLUTE_PATH/"),
            ("ABSOLUTE_PATH/welcome.mp3", str(self.clip)),
            (PLACEHOLDER, base64.b64encode(self.clip.read_bytes()).decode()),
        ):
            text = text.replace(old, new)
        return text


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds only `welcome.mp3`."""
    path = tmp_path_factory.mktemp("audio") / "welcome.mp3"
    soundfile.write(path, np.random.default_rng(1).uniform(-0.2, 0.2, 16_000), 16_000, format="MP3")
    return path


@pytest.fixture
def manual(tap: Tap, fake_service: RunningService, media: MediaServer, clip: Path) -> Manual:
    """The manual, with its clip on the web."""
    media.files[ON_THE_WEB] = clip.read_bytes()
    caption = ask_native(fake_service.url, data_url(clip.read_bytes())).text
    return Manual(tap.relay(fake_service).origin, media.url("").rstrip("/"), clip, caption)


def printed(command: list[str], home: Path) -> str:
    """Return the command's output, with an API key in its environment as the manual advises."""
    variables = bare_variables(home) | {"DASHSCOPE_API_KEY": "sk-test"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "kind"),
    [(f"dashscope-{version}", kind) for version in ("2.0.2", "1.24.10") for kind in ("url", "stream", "file", "base64")]
    + [(f"openai-{version}", kind) for version in ("3.54.0", "1.52.2") for kind in ("url", "stream", "base64")],
)
def test_python(environment: str, kind: str, manual: Manual, tmp_path: Path) -> None:
    """The seven Python samples run, with an old and a new version of each client."""
    sample = f"python-{environment.partition('-')[0]}-{kind}"
    script = tmp_path / "sample.py"
    script.write_text(manual.sample(sample))
    output = printed([str(python_environment(environment) / "bin" / "python"), str(script)], tmp_path)
    said = output.partition("完整内容为:")[2] if sample == "python-dashscope-stream" else output
    assert said.removeprefix("输出结果为:\n").strip() == manual.caption


@pytest.mark.parametrize("environment", ["openai-npm-7.57.0", "openai-npm-4.104.0"])
@pytest.mark.parametrize("kind", ["url", "stream", "base64"])
def test_node(environment: str, kind: str, manual: Manual, tmp_path: Path) -> None:
    """The three Node samples run, with an old and a new version of the client."""
    source = manual.sample(f"node-{kind}")
    output = printed(["node", str(node_script(environment, source, tmp_path / "sample.mjs"))], tmp_path)
    if kind == "stream":
        output, _, usage = output.partition("{")
        assert "prompt_tokens: " in usage
        output = output.replace("\n", "")
    assert output.strip() == manual.caption


@pytest.mark.parametrize("kind", ["url", "stream", "base64"])
@pytest.mark.parametrize("dialect", ["native", "compatible"])
def test_curl(dialect: str, kind: str, manual: Manual, tmp_path: Path) -> None:
    """The six commands run, pasted into a shell."""
    command = manual.sample(f"curl-{dialect}-{kind}")
    script = tmp_path / "sample.sh"
    script.write_text(command)
    output = printed(["bash", str(script)], tmp_path)
    chunks = events(output) if kind == "stream" else [json.loads(output)]
    pieces = []
    for chunk in chunks:
        for choice in (chunk["output"] if dialect == "native" else chunk)["choices"]:
            content = (choice.get("message") or choice["delta"])["content"]
            pieces.append(content[0]["text"] if dialect == "native" else content)
    assert "".join(pieces) == manual.caption
    assert chunks[-1]["usage"]["total_tokens"] == 13 + 8 + 24
