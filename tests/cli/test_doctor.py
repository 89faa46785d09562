"""`captioner doctor`: each fault of a machine or service is one finding, with words on which a person can act."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serving.cli.doctor import gpu, host
from serving.cli.doctor.findings import Level, Probe, ok, run_all
from serving.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator

CAPTIONER = "Qwen/Qwen3-Omni-30B-A3B-Captioner"
H100 = "{index}, GPU-{index}, NVIDIA H100 80GB HBM3, {driver}, 81559, {free}, 9.0"
L4 = "0, GPU-a1, NVIDIA L4, 580.95.05, 23034, 22600, 8.9"
PASSWORD = "hunter2-is-a-password"  # noqa: S105


def listing(*lines: str) -> str:
    """Return the script of an `nvidia-smi` that lists these GPUs."""
    return "cat <<'END'\n" + "\n".join(lines) + "\nEND"


def h100(count: int = 1, driver: str = "580.95.05", free: int = 81_000) -> str:
    """Return the script of an `nvidia-smi` with this number of H100."""
    return listing(*(H100.format(index=index, driver=driver, free=free) for index in range(count)))


def test_a_machine_without_gpu_serves_the_stand_in(doctor: Any) -> None:
    """On this machine the default settings have no finding but `ok`, and the exit status is 0."""
    status, found = doctor()
    assert status == 0
    assert found["gpu"] == [
        ("ok", "no GPU (nvidia-smi is not installed): the engine runs the embedded stand-in on the CPU", "")
    ]
    assert {level for each in found.values() for level, _, _ in each} <= {"ok", "warning"}
    assert {"settings", "weights", "ram", "disk", "database", "redis", "files", "port"} <= found.keys()


def test_the_report_is_for_people(machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Without `--json` each finding is a line with level and probe, and each remedy a line below; the sum is last."""
    assert main(["doctor", "--part=frontend", "--data-dir=/proc/version/x"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok       settings  the settings are valid"
    at = lines.index("error    disk      data_dir /proc/version/x cannot be used: /proc/version: not a directory")
    assert lines[at + 1].strip() == "remedy: make /proc/version/x a directory that this user can write, or set data_dir"
    assert lines[-1].startswith("2 errors, ")  # uploads are below data_dir


def test_wrong_settings_are_findings(doctor: Any) -> None:
    """A wrong setting is a finding and status 1; a secret among the settings is not shown."""
    status, found = doctor("--port=http", f"--admin-token={PASSWORD[:9]}")
    assert status == 1
    assert [each[0] for each in found["settings"]] == ["error", "error"]
    assert PASSWORD[:9] not in json.dumps(found)


@pytest.mark.parametrize("count", [1, 2])
def test_a_fitting_gpu(doctor: Any, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """H100s are found, the driver is accepted, and the profile is named with its arithmetic."""
    monkeypatch.setattr(gpu, "has_cuda_build", lambda: True)
    nvidia_smi(h100(count))
    _, found = doctor("--part=engine", f"--model={CAPTIONER}", f"--tensor-parallel={count}")
    assert found["gpu"] == [("ok", f"{count} GPUs: " + ", ".join(["NVIDIA H100 80GB HBM3 79.6 GiB"] * count), "")]
    assert found["driver"] == [("ok", "NVIDIA driver 580.95.05 (CUDA 13 needs 580 or newer)", "")]
    name, text = {
        1: ("1xh100-80g", "weights 58.1 - working memory 4.0 (estimate) = KV cache 11.2 GiB = 122,000 tokens"),
        2: ("2xa100-80g", "weights 29.1 - working memory 4.0 (estimate) = KV cache 40.2 GiB = 877,000 tokens"),
    }[count]
    expected = f"deploy/profiles/{name}.toml fits: 73.3 GiB of each GPU - {text}"
    assert found["profile"] == [("ok", expected, "")]
    assert found["memory"][0][0] == "ok"


def test_a_gpu_that_is_too_small(doctor: Any, nvidia_smi: Any) -> None:
    """An L4 is an error: the arithmetic shows what is missing, and the remedy names what would fit."""
    nvidia_smi(listing(L4))
    status, found = doctor("--part=engine", f"--model={CAPTIONER}")
    assert status == 1
    assert found["memory"] == [
        ("error",
         ("1 x 22.5 GiB, BF16: 20.2 GiB of each GPU - weights 58.1 - working memory 4.0 (estimate) = missing 41.9 GiB; "
          "one context of max_model_len 65,536 needs 6.0"),
         "use 4 such GPUs: set tensor_parallel to 4"),
    ]  # fmt: skip
    assert found["profile"][0][0] == "ok"
    assert found["profile"][0][1].startswith("deploy/profiles/1xl4-int4.toml fits, with an INT4 checkpoint: ")


def test_no_profile_fits_a_gpu_of_16_gib(doctor: Any, nvidia_smi: Any) -> None:
    """The warning names the memory of the GPUs for which there are profiles."""
    nvidia_smi(listing("0, GPU-a, NVIDIA A2, 580.95.05, 15356, 15000, 8.6"))
    status, found = doctor("--part=engine", f"--model={CAPTIONER}")
    assert status == 1
    assert found["profile"][0][:2] == ("warning", "no profile of deploy/profiles fits 1 x 15.0 GiB")


@pytest.mark.parametrize(
    ("script", "flags", "probe", "message"),
    [
        (h100(driver="550.54.15"), [], "driver", "NVIDIA driver 550.54.15 is too old: CUDA 13 needs 580 or newer"),
        (h100(), ["--tensor-parallel=2"], "gpu", "tensor_parallel is 2, and there are 1 GPUs"),
        (h100(free=40_000), [], "gpu",
         "GPU 0 has 39.1 GiB free, and vLLM reserves 71.7 (gpu_memory_utilization 0.9 of 79.6)"),
        (h100(), [], "build", "the CPU build of vLLM is installed, and does not use these GPUs"),
        (listing("0, GPU-t, Tesla T4, 580.1, 15360, 15000, 7.5"), [], "gpu",
         "Tesla T4 has compute capability 7.5; BF16 needs 8"),
    ],
    ids=["driver", "count", "occupied", "build", "old"],
)  # fmt: skip
def test_a_gpu_that_cannot_serve(  # noqa: PLR0917
    doctor: Any, nvidia_smi: Any, script: str, flags: list[str], probe: str, message: str
) -> None:
    """Driver, number, occupation, build and generation of the GPUs are errors of their own."""
    nvidia_smi(script)
    status, found = doctor("--part=engine", f"--model={CAPTIONER}", *flags)
    assert status == 1
    assert ("error", message) in [each[:2] for each in found[probe]]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9",
         ("nvidia-smi failed with status 9: NVIDIA-SMI has failed because it could not communicate with the driver.")),
        ("exec sleep 30", "nvidia-smi gave no answer within 0.5 s: the driver hangs"),
        ("true", "nvidia-smi lists no GPU"),
    ],
    ids=["fails", "hangs", "none"],
)  # fmt: skip
def test_a_driver_that_does_not_answer(
    doctor: Any, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    """With the CUDA build a driver that fails or hangs is an error with its own words."""
    monkeypatch.setattr(gpu, "has_cuda_build", lambda: True)
    monkeypatch.setattr(gpu, "_TIMEOUT_S", 0.5)
    nvidia_smi(script)
    status, found = doctor("--part=engine")
    assert status == 1
    assert found["gpu"][0][1] == f"no GPU: {reason}; the CUDA build of vLLM needs one"


def test_a_gpu_without_nvidia_smi(doctor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container with a GPU's device and without the program is a warning: vLLM does not need the program."""
    monkeypatch.setattr(gpu, "has_cuda_build", lambda: True)
    monkeypatch.setattr(gpu, "DEVICES", tmp_path)
    monkeypatch.setattr("serving.cli.doctor.gpu.shutil.which", lambda _: None)
    status, found = doctor("--part=engine")
    assert (status, found["gpu"][0][0]) == (1, "error")
    (tmp_path / "nvidia0").touch()
    status, found = doctor("--part=engine")
    assert status == 0
    assert found["gpu"][0][:2] == ("warning", "a GPU is here, but cannot be checked: nvidia-smi is not installed")


@pytest.mark.parametrize("name", ["someone/Qwen3-Omni-30B-A3B-Captioner-AWQ-4bit", "someone/qwen3-omni-30b-a3b-fp8"])
def test_a_quantized_checkpoint_is_not_calculated(doctor: Any, nvidia_smi: Any, name: str) -> None:
    """The arithmetic is of BF16: for smaller weights it would refuse a GPU that is large enough."""
    nvidia_smi(listing(L4))
    _, found = doctor("--part=engine", f"--model={name}")
    assert found["memory"][0][0] == "warning"
    assert found["memory"][0][1].startswith(f"memory was not calculated: {name} is not known")


@pytest.mark.parametrize(("flags", "expected"), [([], 1), (["--exit-zero"], 0)])
def test_exit_statuses(machine: None, flags: list[str], expected: int, capsys: pytest.CaptureFixture[str]) -> None:
    """An error is status 1, or 0 with `--exit-zero`; it is reported in both cases. A wrong option is 2."""
    assert main(["doctor", "--json", "--port=http", *flags]) == expected
    assert json.loads(capsys.readouterr().out)["ok"] is False
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--part=nothing"])
    assert stopped.value.code == 2


def test_hidden_gpus_do_not_count(doctor: Any, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the GPUs of CUDA_VISIBLE_DEVICES count."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-0")
    nvidia_smi(h100(4))
    _, found = doctor("--part=engine")
    assert found["gpu"][0][1].startswith("2 GPUs: ")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    directory = tmp_path / "full"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_no_disk(doctor: Any, full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room for the journal, and for the download of the weights, is an error with both figures."""
    monkeypatch.setenv("HF_HOME", str(full_disk))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, found = doctor(f"--data-dir={full_disk}", f"--model={CAPTIONER}")
    assert status == 1
    message = f"data_dir {full_disk}: 0.0 GiB free, max_journal_bytes allows 0.25: "
    message += "requests are refused when the journal cannot grow"
    remedy = "free space, set data_dir to a larger disk, or lower max_journal_bytes"
    assert found["disk"][0] == ("error", message, remedy)
    assert found["weights"] == [
        ("error", f"0.0 GiB free in {full_disk}/hub, and the download needs 59.1",
         "free space, or set HF_HOME (of ModelScope: MODELSCOPE_CACHE) to a larger disk"),
    ]  # fmt: skip


@pytest.mark.parametrize(("limit", "level"), [(700, "error"), (1000, "warning"), (5000, "ok")])
def test_a_low_limit_of_files(limit: int, level: str, tmp_path: Path) -> None:
    """Below the number of requests the limit is an error; the remedy has the number that is needed."""
    captioner = Path(sys.executable).with_name("captioner")
    command = f"ulimit -n {limit}; exec {captioner} doctor --json --part=frontend --data-dir={tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    (found,) = [each for each in json.loads(done.stdout)["findings"] if each["probe"] == "files"]
    assert found["level"] == level
    assert found["message"].startswith(f"limit of open files {limit:,}, 2,304 wanted for max_concurrent_requests 512")
    assert done.returncode == (1 if level == "error" else 0)
    assert level == "ok" or found["remedy"].startswith("raise it to 2304 or more (`ulimit -Hn`, LimitNOFILE= ")


def test_a_port_in_use(doctor: Any) -> None:
    """A port on which another process listens is an error."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        used = other.getsockname()[1]
        status, found = doctor(f"--port={used}")
    assert status == 1
    assert found["port"][0][:2] == ("error", f"127.0.0.1:{used}: another process listens there")


def test_little_shared_memory(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's 64 MiB of /dev/shm are an error for two processes, and no matter for one."""
    monkeypatch.setattr("serving.cli.doctor.host.shutil.disk_usage", lambda _: type("Usage", (), {"free": 64 << 20}))
    _, found = doctor("--part=engine", "--tensor-parallel=2")
    assert found["shm"][0][:2] == (
        "error",
        "0.06 GiB free in /dev/shm, 2 wanted for 2 processes; below 0.25 they cannot start",
    )
    assert doctor("--part=engine")[1]["shm"][0][0] == "ok"


def test_little_memory(doctor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's limit counts before the machine's memory, less what the kernel can reclaim."""
    for name, text in (("max", 4 << 30), ("current", 2 << 30), ("stat", f"anon 1\ninactive_file {1 << 30}")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    _, found = doctor("--audio-workers=2")
    assert found["ram"][0][0] == "warning"
    assert found["ram"][0][1].startswith("3.0 GiB available (limit of the container), 7.8 needed at most")


def test_incomplete_weights(doctor: Any, tmp_path: Path) -> None:
    """A directory without a file of its index is an error that names the file; one that is not there is another."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")
    _, found = doctor("--part=engine", f"--model={tmp_path}")
    assert found["weights"][0][:2] == ("error", f"{tmp_path} lacks model-00002-of-00002.safetensors")
    _, found = doctor("--part=engine", f"--model={tmp_path}/none")
    assert found["weights"][0][:2] == ("error", f"model: the directory {tmp_path}/none does not exist")


def test_a_fake_engine_needs_no_gpu(doctor: Any) -> None:
    """With `engine=fake` nothing of a model is looked at; `--part` leaves out the other part's probes."""
    _, found = doctor("--engine=fake")
    assert not {"gpu", "weights", "shm", "memory"} & found.keys()
    _, found = doctor("--part=engine")
    assert not {"database", "redis", "disk", "files", "port"} & found.keys()


def test_a_probe_has_a_deadline_and_cannot_break_the_others() -> None:
    """A probe that hangs, and one that raises, are findings without any text that may be a secret."""

    def hangs() -> list[Any]:
        time.sleep(30)
        return []

    def breaks() -> list[Any]:
        raise RuntimeError(PASSWORD)

    probes = [
        Probe("slow", hangs),
        Probe("broken", breaks),
        Probe("good", lambda: [ok("good", "yes")]),
    ]
    began = time.monotonic()
    found = run_all(probes, deadline_s=0.5)
    assert time.monotonic() - began < 5
    assert [(each.probe, each.level, each.message) for each in found] == [
        ("slow", Level.ERROR, "no answer within 0.5 s"),
        ("broken", Level.WARNING, "the probe failed: RuntimeError"),
        ("good", Level.OK, "yes"),
    ]
