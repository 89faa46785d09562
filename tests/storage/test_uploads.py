"""Upload policies, and the directory that keeps uploaded files."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
import time
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.config import Settings
from serving.storage import uploads
from serving.storage.uploads import DirectoryUploads, UploadPolicies, UploadPolicy, UploadStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

OWNER, MODEL = "0123456789abcdef", "qwen3-omni-30b-a3b-captioner"
MIB = 1024 * 1024


def settings(directory: Path, **changes: object) -> Settings:
    """Small limits, and a secret as replicas share it."""
    return Settings.model_validate(
        {
            "uploads_dir": directory,
            "upload_secret": "s3cret",
            "max_upload_bytes": 1000,
            "max_uploads_bytes": MIB,
            **changes,
        }
    )


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DirectoryUploads]:
    """A store that runs."""
    store = DirectoryUploads(settings(tmp_path))
    await store.start()
    yield store
    await store.stop()


async def put(store: UploadStore, name: str, data: bytes, policy: UploadPolicy | None = None) -> str:
    """Upload as a client does; return the key."""
    policy = policy or store.issue(OWNER, MODEL)
    key = f"{policy.upload_dir}/{name}"
    grant = store.check(policy=policy.policy, signature=policy.signature, key=key)
    async with store.receive(grant) as upload:
        for start in range(0, len(data), 300):
            await upload.write(data[start : start + 300])
    return key


async def fetch(store: UploadStore, key: str, owner: str = OWNER, model: str = MODEL) -> bytes:
    """Read a stored file as the path does."""
    return (await store.open(key, owner=owner, model=model)).read_bytes()


def stored(directory: Path) -> list[Path]:
    """Every file that is stored."""
    return [path for path in directory.rglob("*") if path.is_file()]


# Policies


async def test_a_policy_names_its_directory_and_terms(store: DirectoryUploads) -> None:
    """What the client gets: a fresh directory for the owner and day, the time it has, and the most it may send."""
    first, second = store.issue(OWNER, MODEL), store.issue(OWNER, MODEL)
    root, owner, day, unique = first.upload_dir.split("/")
    assert (root, len(owner), len(day), len(unique)) == ("dashscope-instant", 32, 10, 36)
    assert OWNER not in first.upload_dir
    assert (first.expires_in_s, first.max_bytes) == (300, 1000)
    assert first.upload_dir != second.upload_dir
    assert first.upload_dir.split("/")[1] == second.upload_dir.split("/")[1]


def test_only_what_was_signed_with_the_secret_is_accepted(tmp_path: Path) -> None:
    """Changing a letter of the policy or the signature, or signing with another secret, is noticed."""
    policies = UploadPolicies(settings(tmp_path))
    good = policies.issue(OWNER, MODEL)
    key = f"{good.upload_dir}/a.wav"
    terms = json.loads(base64.b64decode(good.policy))
    other = base64.b64encode(json.dumps(terms | {"max_bytes": 10**9}).encode()).decode()
    stranger = UploadPolicies(settings(tmp_path, upload_secret=None)).issue(OWNER, MODEL)
    for policy, signature in [
        (other, good.signature),
        (good.policy, good.signature[:-2] + "A="),
        (good.policy, good.signature.lower()),
        (good.policy, ""),
        (good.policy, "ü\ud800"),
        ("", good.signature),
        ("\ud800", good.signature),
        (good.policy + "\n", good.signature),
        (stranger.policy, stranger.signature),
    ]:
        with pytest.raises(errors.PolicyInvalid) as caught:
            policies.check(policy=policy, signature=signature, key=key)
        assert caught.value.code == "AccessDenied"
    assert policies.check(policy=good.policy, signature=good.signature, key=key).owner == OWNER


def test_replicas_with_one_secret_accept_each_others_policies(tmp_path: Path) -> None:
    """The policy is all there is: no state need be shared. Without a set secret each service has its own."""
    policy = UploadPolicies(settings(tmp_path)).issue(OWNER, MODEL)
    key = f"{policy.upload_dir}/a"
    UploadPolicies(settings(tmp_path)).check(policy=policy.policy, signature=policy.signature, key=key)
    with pytest.raises(errors.PolicyInvalid):
        UploadPolicies(Settings()).check(policy=policy.policy, signature=policy.signature, key=key)


def test_a_policy_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time a policy is refused in the words of the object store."""
    policies = UploadPolicies(settings(tmp_path))
    policy = policies.issue(OWNER, MODEL)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 299)
    policies.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    monkeypatch.setattr(time, "time", lambda: now + 301)
    with pytest.raises(errors.PolicyExpired, match=r"Invalid according to Policy: Policy expired\."):
        policies.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")


@pytest.mark.parametrize(
    "key",
    [
        "{dir}/a.wav",
        "{dir}/t ö+n%e.wav",
        "{dir}/a#b?c=d&e",
        "{dir}/音频 文件.mp3",
        "{dir}/..a..wav",
        "{dir}/%2e%2e%2fa",
        "{dir}/ ",
        "{dir}/" + "n" * 255,
    ],
)
async def test_any_file_name_is_allowed(store: DirectoryUploads, key: str) -> None:
    """Names are raw text: spaces, percent signs and other scripts are just that."""
    policy = store.issue(OWNER, MODEL)
    name = key.removeprefix("{dir}/")
    assert await fetch(store, await put(store, name, b"abc", policy)) == b"abc"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "a.wav",
        "{dir}",
        "{dir}/",
        "{dir}/.",
        "{dir}/..",
        "{dir}/../a",
        "{dir}/a/b",
        "{dir}//a",
        "{dir}/a\\b",
        "{dir}/a\0b",
        "{dir}/a\nb",
        "{dir}/a\x7f",
        "/{dir}/a",
        "./{dir}/a",
        "{dir}x/a",
        "{dir}/x/../a",
        "dashscope-instant/a",
        "/etc/passwd",
        "{other}/a",
        "{dir}/" + "ö" * 600,
    ],
)
async def test_no_other_key_is_allowed(store: DirectoryUploads, key: str) -> None:
    """A key is the policy's directory and one segment; nothing climbs out of it."""
    policy, other = store.issue(OWNER, MODEL), store.issue(OWNER, MODEL)
    key = key.format(dir=policy.upload_dir, other=other.upload_dir)
    with pytest.raises(errors.KeyNotAllowed) as caught:
        store.check(policy=policy.policy, signature=policy.signature, key=key)
    assert caught.value.code == "AccessDenied"


@hypothesis.settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_refused_in_kind(tmp_path_factory: pytest.TempPathFactory, a: str, b: str, c: str) -> None:
    """Whatever a form holds, the answer is a refusal and never another exception."""
    policies = UploadPolicies(settings(tmp_path_factory.getbasetemp()))
    good = policies.issue(OWNER, MODEL)
    with pytest.raises(errors.PolicyInvalid):
        policies.check(policy=a, signature=b, key=c)
    try:
        grant = policies.check(policy=good.policy, signature=good.signature, key=f"{good.upload_dir}/{c}")
    except errors.KeyNotAllowed:
        assert not c or c in (".", "..") or any(letter in "/\\\x7f" or letter < " " for letter in c)
    else:
        assert grant.key.endswith(c)


# Receiving


async def test_a_stored_file_is_private(store: DirectoryUploads, tmp_path: Path) -> None:
    """Only the service's user can read it, and its name on disk tells nothing of the client's."""
    key = await put(store, "secret-name.wav", b"abc")
    (path,) = stored(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "secret" not in str(path)
    assert await store.open(key, owner=OWNER, model=MODEL) == path


async def test_a_file_belongs_to_its_owner_and_model(store: DirectoryUploads) -> None:
    """Another caller, another model, and another key find nothing."""
    key = await put(store, "a.wav", b"abc")
    assert await fetch(store, key) == b"abc"
    for other in (
        {"key": key, "owner": "someone", "model": MODEL},
        {"key": key, "owner": OWNER, "model": "other"},
        {"key": key + "x", "owner": OWNER, "model": MODEL},
        {"key": "../../etc/passwd", "owner": OWNER, "model": MODEL},
        {"key": "\ud800\0", "owner": "", "model": ""},
    ):
        with pytest.raises(errors.UploadNotFound):
            await store.open(other["key"], owner=other["owner"], model=other["model"])


async def test_several_files_under_one_policy(store: DirectoryUploads) -> None:
    """One policy serves all files of a call."""
    policy = store.issue(OWNER, MODEL)
    keys = [await put(store, f"{number}.wav", str(number).encode(), policy) for number in range(5)]
    assert [await fetch(store, key) for key in keys] == [b"0", b"1", b"2", b"3", b"4"]


async def test_nothing_is_overwritten(store: DirectoryUploads, tmp_path: Path) -> None:
    """A second upload of a key is refused before it is read, and the first one stays."""
    policy = store.issue(OWNER, MODEL)
    key = await put(store, "a.wav", b"first", policy)
    with pytest.raises(errors.UploadExists) as caught:
        await put(store, "a.wav", b"second", policy)
    assert caught.value.code == "FileAlreadyExists"
    assert await fetch(store, key) == b"first"
    assert len(stored(tmp_path)) == 1


async def test_of_two_uploads_at_once_one_wins_whole(store: DirectoryUploads, tmp_path: Path) -> None:
    """Uploads of one key that overlap do not mix: the first to end is stored, the other refused."""
    policy = store.issue(OWNER, MODEL)
    grant = store.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    with pytest.raises(errors.UploadExists):  # noqa: PT012 - on leaving, not before
        async with store.receive(grant) as slow:
            await slow.write(b"slow")
            async with store.receive(grant) as quick:
                await quick.write(b"quick")
            await slow.write(b"slow")
    assert await fetch(store, grant.key) == b"quick"
    assert len(stored(tmp_path)) == 1
    assert store.used_bytes == 5


async def test_the_size_is_limited_while_reading(store: DirectoryUploads, tmp_path: Path) -> None:
    """The largest file is inclusive; a byte more is refused when it arrives, and leaves nothing."""
    await put(store, "most", bytes(1000))
    with pytest.raises(errors.UploadTooLarge) as caught:
        await put(store, "more", bytes(1001))
    assert caught.value.code == "EntityTooLarge"
    assert len(stored(tmp_path)) == 1
    assert store.used_bytes == 1000


async def test_an_upload_that_fails_or_is_cancelled_leaves_nothing(store: DirectoryUploads, tmp_path: Path) -> None:
    """A client that goes leaves no file and no counted byte, and may try again with the same key."""
    policy = store.issue(OWNER, MODEL)
    grant = store.check(policy=policy.policy, signature=policy.signature, key=f"{policy.upload_dir}/a")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the exception comes from within
        async with store.receive(grant) as upload:
            await upload.write(b"abc")
            raise ZeroDivisionError

    async def hang() -> None:
        async with store.receive(grant) as upload:
            await upload.write(b"abc")
            await asyncio.sleep(60)

    task = asyncio.create_task(hang())
    await asyncio.sleep(0.01)
    assert len(stored(tmp_path)) == 1
    with pytest.raises(errors.UploadNotFound):
        await store.open(grant.key, owner=OWNER, model=MODEL)
    task.cancel()
    await asyncio.wait((task,))
    assert not stored(tmp_path)
    assert store.used_bytes == 0
    assert await fetch(store, await put(store, "a", b"again", policy)) == b"again"


async def test_the_disk_is_bounded(tmp_path: Path) -> None:
    """When uploads fill the disk they may take, the next is refused for now; what is stored stays."""
    store = DirectoryUploads(settings(tmp_path, max_upload_bytes=MIB))
    await store.start()
    key = await put(store, "a", bytes(MIB // 2))
    with pytest.raises(errors.Overloaded) as caught:
        await put(store, "b", bytes(MIB // 2 + 1), store.issue("other", MODEL))
    assert "all the space that one caller's may take" in str(caught.value)
    left = MIB // 2
    for number in range(20):
        await put(store, "c", bytes(left // 2), store.issue(f"owner {number}", MODEL))
        left -= left // 2
    with pytest.raises(errors.Overloaded) as caught:
        await put(store, "d", bytes(left + 1), store.issue("last", MODEL))
    assert str(caught.value) == errors.Overloaded.message
    assert len(await fetch(store, key)) == MIB // 2
    await store.stop()


async def test_no_owner_fills_the_disk(tmp_path: Path) -> None:
    """One may take half of what the others leave, also of what it had stored before a restart; it is told why."""
    changes = {"max_upload_bytes": MIB}
    store = DirectoryUploads(settings(tmp_path, **changes))
    await store.start()
    for number in range(2):
        await put(store, str(number), bytes(MIB // 4))
    await store.stop()
    again = DirectoryUploads(settings(tmp_path, **changes))
    await again.start()
    with pytest.raises(errors.Overloaded, match="all the space that one caller's may take") as caught:
        await put(again, "more", b"1")
    assert caught.value.retry_after_s == 60
    old = stored(tmp_path)
    await put(again, "a", bytes(MIB // 4), again.issue("other", MODEL))
    for path in old:
        os.utime(path, times=(0, 0))
    await again.sweep()
    assert again.used_bytes == MIB // 4
    await put(again, "b", b"now there is room")
    await again.stop()


async def test_a_full_disk_is_our_fault(store: DirectoryUploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left on the device is `Overloaded`."""
    real = os.open
    monkeypatch.setattr(os, "open", lambda *_: real("/dev/full", os.O_WRONLY))
    with pytest.raises(errors.Overloaded):
        await put(store, "a", b"abc")
    assert store.used_bytes == 0


async def test_no_file_to_write_to_is_our_fault(store: DirectoryUploads, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be made, as all descriptors are taken, is `Overloaded`."""

    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(errors.Overloaded):
        await put(store, "a", b"abc")
    assert store.used_bytes == 0


# Keeping


async def test_files_expire(store: DirectoryUploads, tmp_path: Path) -> None:
    """After 48 hours a file is not found; it is removed an hour later, when nobody can still be reading it."""
    assert Settings().upload_ttl_s == 48 * 3600
    key, fresh = await put(store, "a", b"abc"), await put(store, "b", b"defg")
    path = await store.open(key, owner=OWNER, model=MODEL)
    os.utime(path, times=(0, time.time() - 48 * 3600 + 5))
    assert await fetch(store, key) == b"abc"
    os.utime(path, times=(0, time.time() - 48 * 3600 - 5))
    with pytest.raises(errors.UploadNotFound):
        await fetch(store, key)
    await store.sweep()
    assert path.exists()
    os.utime(path, times=(0, time.time() - 49 * 3600 - 5))
    await store.sweep()
    assert not path.exists()
    assert await fetch(store, fresh) == b"defg"
    assert store.used_bytes == 4
    assert len(stored(tmp_path)) == 1


async def test_the_sweeper_sweeps_by_itself_and_survives(
    store: DirectoryUploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sweeping goes on in the background, whatever a single sweep meets."""
    monkeypatch.setattr(uploads, "_SWEEP_S", 0.01)
    await store.stop()
    await store.start()
    await put(store, "a", b"abc")
    (path,) = stored(tmp_path)
    directory, store._directory = store._directory, tmp_path / "gone"
    async with asyncio.timeout(20):
        while "uploads sweep failed" not in caplog.text:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.01)
    store._directory = directory
    os.utime(path, times=(0, 0))
    async with asyncio.timeout(20):
        while path.exists():  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.01)


async def test_a_restart_finds_what_was_stored(tmp_path: Path) -> None:
    """Files outlive the service, are counted again, and what was half-written is removed once it is old."""
    first = DirectoryUploads(settings(tmp_path))
    await first.start()
    key = await put(first, "t ö+n%e.wav", b"abc")
    await first.stop()
    await first.stop()
    young, old = (tmp_path / f"captioner-uploads-{os.geteuid()}" / f"{age}.partial" for age in ("young", "old"))
    young.write_bytes(b"12345")
    old.write_bytes(b"1234567")
    os.utime(old, times=(0, time.time() - 3700))
    second = DirectoryUploads(settings(tmp_path))
    await second.start()
    assert await fetch(second, key) == b"abc"
    assert young.exists()
    assert not old.exists()
    assert second.used_bytes == 8
    await second.stop()


async def test_bytes_received_during_a_sweep_are_counted(
    store: DirectoryUploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep counts in another thread; what arrives meanwhile is not forgotten."""
    await put(store, "a", b"abc")
    counted = store._sweep()
    arrived = asyncio.Event()

    def slow() -> Mapping[str, int]:
        asyncio.run_coroutine_threadsafe(arrived.wait(), loop).result()
        return counted

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(store, "_sweep", slow)
    sweeping = asyncio.create_task(store.sweep())
    await asyncio.sleep(0.01)
    await put(store, "b", b"defg")
    arrived.set()
    await sweeping
    assert store.used_bytes == 7


async def test_another_users_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that someone else has put in our place is refused at the start."""
    store = DirectoryUploads(settings(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError):
        await store.start()
