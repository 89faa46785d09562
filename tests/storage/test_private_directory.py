"""The directory of uploads cannot be prepared by another user of the machine."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from serving.config import Settings
from serving.storage.private_directory import make_private
from serving.storage.uploads import DirectoryUploads, uploads_directory
from tests.storage.client import settings

REMEDY = "remove it, or set uploads_dir to a directory that only this user can write"


def test_the_default_is_in_the_data_directory(tmp_path: Path) -> None:
    """Without a setting, files are in the service's own directory, not under a known name in that of all users."""
    assert uploads_directory(Settings(data_dir=tmp_path)).parent == tmp_path / "uploads"
    assert uploads_directory(Settings(data_dir=tmp_path, uploads_dir=tmp_path / "shared")).parent == tmp_path / "shared"


async def test_the_directory_is_private(tmp_path: Path) -> None:
    """It is made for its owner alone with every directory above it that is missing, and an old one is closed."""
    os.umask(0o022)
    store = DirectoryUploads(settings(tmp_path / "data" / "uploads"))
    await store.start()
    await store.stop()
    made = tmp_path / "data" / "uploads" / f"captioner-uploads-{os.geteuid()}"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, made.parent)] == [0o700, 0o700]
    made.chmod(0o777)
    await store.start()
    await store.stop()
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_another_users_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that another user made is not used, and is left as it is."""
    directory = tmp_path / "uploads"
    directory.mkdir(mode=0o755)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError) as caught:
        make_private(directory, "uploads_dir")
    assert str(caught.value) == f"uploads_dir: {directory} belongs to another user: {REMEDY}"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_a_link_is_refused(tmp_path: Path) -> None:
    """A link to a directory, even to one of ours, is not followed; nor is a link to nothing."""
    (tmp_path / "target").mkdir()
    link = tmp_path / "link"
    for target in (tmp_path / "target", tmp_path / "missing"):
        link.symlink_to(target)
        with pytest.raises(NotADirectoryError) as caught:
            make_private(link, "uploads_dir")
        assert str(caught.value) == f"uploads_dir: {link} is a link: {REMEDY}"
        link.unlink()
    assert not (tmp_path / "missing").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    """Anything else of that name is refused, too."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(NotADirectoryError, match="is not a directory"):
            make_private(tmp_path / name, "uploads_dir")


def test_the_service_does_not_start_with_a_prepared_directory(tmp_path: Path) -> None:
    """`captioner serve` ends at once, with one line that says what to do."""
    (tmp_path / f"captioner-uploads-{os.geteuid()}").symlink_to("/tmp")  # noqa: S108
    command = [str(Path(sys.executable).with_name("captioner")), "serve", "--engine=fake", "--port=0"]
    ended = subprocess.run(
        [*command, f"--uploads-dir={tmp_path}", f"--data-dir={tmp_path / 'data'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        f"captioner: uploads_dir: {tmp_path}/captioner-uploads-{os.geteuid()} is a link: {REMEDY}\n"
    )
