"""Dockerfiles: lint, rules of the images, contents of the build context, and `missing_requirements.py`."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SCRIPT = DOCKER / "missing_requirements.py"
LOCKS = ROOT / "deploy" / "requirements"
PROGRAMS = Path(sys.executable).parent


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return each instruction and its arguments, with lines joined and without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def last_stage(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of the last stage."""
    found = instructions(path)
    return found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]


def test_every_build_has_a_dockerfile() -> None:
    """There is a Dockerfile for the CPU, one for CUDA, and one for frontends."""
    assert {"cpu.Dockerfile", "cuda.Dockerfile", "frontend.Dockerfile"} <= {path.name for path in DOCKERFILES}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    """It has not even advice. Each exception is in the file, with a reason in the line above."""
    done = subprocess.run([PROGRAMS / "hadolint", "--no-fail", "--format=json", path], check=True, capture_output=True)
    assert json.loads(done.stdout) == []
    for before, line in itertools.pairwise(path.read_text().splitlines()):
        if line.startswith("# hadolint ignore"):
            assert re.match(r"# \w", before), f"no reason for {line}"


@pytest.mark.parametrize("name", ["cpu", "cuda", "frontend"])
def test_an_image_follows_the_rules(name: str) -> None:
    """Its base is a pinned argument, its user numeric and not root; it has a health check, labels and two layers."""
    path = DOCKER / f"{name}.Dockerfile"
    everything, final = instructions(path), last_stage(path)
    default = next(rest for instruction, rest in everything if instruction == "ARG" and rest.startswith("BASE_IMAGE="))
    assert re.search(r":v?\d+\.\d+\.\d+", default), "a base without a full version"
    assert {rest.split()[0] for instruction, rest in everything if instruction == "FROM"} <= {
        "${BASE_IMAGE}", "base", "requirements"
    }  # fmt: skip
    users = [rest for instruction, rest in final if instruction == "USER"]
    assert users[-1] == "10001:10001"
    entry = {instruction: rest for instruction, rest in final if instruction in {"ENTRYPOINT", "CMD", "VOLUME"}}
    assert json.loads(entry["ENTRYPOINT"]) == ["captioner"]
    assert json.loads(entry["CMD"]) == ["serve"]
    assert set(json.loads(entry["VOLUME"])) == {"/tmp", "/var/lib/captioner"}  # noqa: S108 - in the image
    assert "/healthz" in next(rest for instruction, rest in final if instruction == "HEALTHCHECK")
    labels = " ".join(rest for instruction, rest in final if instruction == "LABEL")
    for label in ("title", "description", "licenses", "version", "revision", "created", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    # Copied in two layers: the large one that rarely changes, then the small one that often changes.
    copied = [rest.split() for instruction, rest in final if instruction == "COPY"]
    assert [words[:2] for words in copied[:2]] == [["--from=requirements", "/opt/captioner"],
                                                   ["--from=application", "/opt/captioner/app"]]  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", "cuda", "frontend"])
def test_only_locked_requirements_are_installed(name: str) -> None:
    """Each installation checks hashes, except the application's, which must not resolve anything."""
    installs = [
        part
        for instruction, rest in instructions(DOCKER / f"{name}.Dockerfile")
        if instruction == "RUN"
        for part in rest.split("&&")
        if " pip install" in part or "/pip install" in part
    ]
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or {"--no-deps", "--no-build-isolation"} <= set(install.split())


def test_the_build_context_is_minimal() -> None:
    """The context is an allow list without secrets, tests or history."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        word
        for name in ("cpu", "cuda", "frontend")
        for instruction, rest in instructions(DOCKER / f"{name}.Dockerfile")
        if instruction == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    }
    assert {
        path for path in copied if not any(path == rule or path.startswith(rule + "/") for rule in allowed)
    } == set()
    assert {
        rule for rule in allowed if not any(path == rule or path.startswith(rule + "/") for path in copied)
    } == set()
    for path in copied:
        assert (ROOT / path).exists()


def missing_requirements(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `missing_requirements.py` as a build does."""
    return subprocess.run([sys.executable, SCRIPT, *arguments], check=False, capture_output=True, text=True)


def test_frontends_have_the_engines_packages_without_the_engine() -> None:
    """Each requirement is one of cuda.txt, so that both work in one Ray cluster; the engine's are left out."""
    frontend, cuda = (
        re.split(r"\n(?=\S)", (LOCKS / f"{name}.txt").read_text().strip()) for name in ("frontend", "cuda")
    )
    assert set(frontend) < set(cuda)
    assert not [
        name for name in names("\n".join(frontend)) if re.match("torch|vllm|nvidia|cuda|triton|transformers", name)
    ]


def names(requirements: str) -> list[str]:
    """Return the names of the requirements in their order."""
    return re.findall(r"^([a-z0-9][a-z0-9._-]*)==", requirements, re.MULTILINE)


@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_all_requirements_are_missing_by_default(lock: str) -> None:
    """Without exclusions the output is the lock, with hashes and markers."""
    path = LOCKS / f"{lock}.txt"
    assert missing_requirements(path).stdout.strip() == path.read_text().strip()


def test_packages_are_left_out_by_name() -> None:
    """Only the named packages are left out, with their hashes; an unknown name is an error."""
    path = LOCKS / "cpu.txt"
    done = missing_requirements(path, "--without", "triton,nvidia-nvtx")
    assert sorted(set(names(path.read_text())) - set(names(done.stdout))) == ["nvidia-nvtx", "triton"]
    assert done.stdout.count("--hash") < path.read_text().count("--hash")
    wrong = missing_requirements(path, "--without", "trition")
    assert wrong.returncode != 0
    assert "trition" in wrong.stderr


def base_with(tmp_path: Path, **versions: str) -> subprocess.CompletedProcess[str]:
    """Run `missing_requirements.py --base` on a Python that has exactly these packages, with a lock of six."""
    for name, version in versions.items():
        directory = tmp_path / "base" / f"{name}-{version}.dist-info"
        directory.mkdir(parents=True)
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "av==18.1.0 \\\n    --hash=sha256:aa\n"
        "nvidia-nccl-cu13==2.29.7 ; sys_platform == 'linux' \\\n    --hash=sha256:bb\n"
        "orjson==3.1.0 \\\n    --hash=sha256:cc \\\n    --hash=sha256:cd\nstarlette==1.10.0 \\\n    --hash=sha256:dd\n"
        "torch==2.13.0 \\\n    --hash=sha256:ee\nvllm==0.32.0 \\\n    --hash=sha256:ff\n"
    )
    script = f"import sys; sys.path[:] = [p for p in sys.path if 'packages' not in p] + [{str(tmp_path / 'base')!r}]\n"
    script += f"import runpy; sys.argv = ['missing_requirements.py', {str(lock)!r}, '--base']\n"
    script += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-I", "-c", script], check=False, capture_output=True, text=True)


def test_packages_of_the_base_are_left_out(tmp_path: Path) -> None:
    """Packages of the base in the locked version and the engine are left out; another version is installed."""
    done = base_with(tmp_path, vllm="0.32.0+cu130", torch="2.13.0", starlette="1.9.0", orjson="3.1.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [
        "av==18.1.0 \\", "    --hash=sha256:aa", "starlette==1.10.0 \\", "    --hash=sha256:dd", ""
    ]  # fmt: skip


@pytest.mark.parametrize("has", [{"vllm": "0.31.0", "torch": "2.13.0"}, {"vllm": "0.32.0", "torch": "2.12.1"}, {}])
def test_another_engine_in_the_base_fails_the_build(tmp_path: Path, has: dict[str, str]) -> None:
    """A base with another vLLM or PyTorch than the tested one, or with none, fails with a message."""
    done = base_with(tmp_path, **has)
    assert done.returncode != 0
    assert "is locked and tested" in done.stderr
