"""Upload policies: their terms, their signature, and the keys that they allow."""

from __future__ import annotations

import base64
import json
import time
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.config import Settings
from serving.storage.upload_policies import UploadPolicies
from tests.storage.client import MODEL, OWNER, fetch, put, settings

if TYPE_CHECKING:
    from pathlib import Path

    from serving.storage.uploads import DirectoryUploads


async def test_a_policy_names_its_directory_and_terms(store: DirectoryUploads) -> None:
    """A policy has a fresh directory for the owner and day, its time to live, and the largest file."""
    first, second = store.issue(OWNER, MODEL), store.issue(OWNER, MODEL)
    root, owner, day, unique = first.upload_dir.split("/")
    assert (root, len(owner), len(day), len(unique)) == ("dashscope-instant", 32, 10, 36)
    assert OWNER not in first.upload_dir
    assert (first.expires_in_s, first.max_bytes) == (300, 1000)
    assert first.upload_dir != second.upload_dir
    assert first.upload_dir.split("/")[1] == second.upload_dir.split("/")[1]


def test_only_policies_signed_with_the_secret_are_accepted(tmp_path: Path) -> None:
    """A changed policy or signature, or a signature with another secret, is refused."""
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
    """Replicas need no shared state but the secret. Without a set secret each service has its own."""
    policy = UploadPolicies(settings(tmp_path)).issue(OWNER, MODEL)
    key = f"{policy.upload_dir}/a"
    UploadPolicies(settings(tmp_path)).check(policy=policy.policy, signature=policy.signature, key=key)
    with pytest.raises(errors.PolicyInvalid):
        UploadPolicies(Settings()).check(policy=policy.policy, signature=policy.signature, key=key)


def test_a_policy_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time to live a policy is refused in the words of the object store."""
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
    """Names are raw text: spaces, percent signs and other scripts have no meaning."""
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
    """A key is the policy's directory and one segment; no key leads out of the directory."""
    policy, other = store.issue(OWNER, MODEL), store.issue(OWNER, MODEL)
    key = key.format(dir=policy.upload_dir, other=other.upload_dir)
    with pytest.raises(errors.KeyNotAllowed) as caught:
        store.check(policy=policy.policy, signature=policy.signature, key=key)
    assert caught.value.code == "AccessDenied"


@hypothesis.settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_an_upload_error(tmp_path_factory: pytest.TempPathFactory, a: str, b: str, c: str) -> None:
    """Any content of a form is refused with an upload error, never with another exception."""
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
