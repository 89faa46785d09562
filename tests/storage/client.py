"""A client of upload stores: settings with small limits, uploading and reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.config import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from serving.storage.upload_policies import UploadPolicy
    from serving.storage.uploads import UploadStore

OWNER, MODEL = "0123456789abcdef", "qwen3-omni-30b-a3b-captioner"
MIB = 1024 * 1024


def settings(directory: Path, **changes: object) -> Settings:
    """Return small limits, and a secret as replicas share it."""
    return Settings.model_validate(
        {
            "uploads_dir": directory,
            "upload_secret": "s3cret",
            "max_upload_bytes": 1000,
            "max_uploads_bytes": MIB,
            **changes,
        }
    )


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
    """Read a stored file as the pipeline does."""
    async with store.reading(key, owner=owner, model=model) as path:
        return path.read_bytes()
