"""Declarations of the settings of stored files and batches; as in `groups`."""

from __future__ import annotations

from pydantic import BaseModel, Field

from serving.settings.types import MIB, Bytes


class FilesAndBatches(BaseModel):
    """Files of `/v1/files`, and batches of caption requests over them."""

    max_file_bytes: Bytes = Field(
        200 * MIB, ge=1024, description="Largest file of `/v1/files` in bytes, an input file of a batch or an audio"
    )
    max_files_bytes: Bytes = Field(
        50 * 1024 * MIB,
        ge=MIB,
        description="Storage in bytes for the files of all tenants; a tenant may use at most as much as is still free",
    )
    max_files_per_tenant: int = Field(
        10_000, ge=1, description="Most files of one tenant that are kept, so that no tenant uses all inodes"
    )
    file_ttl_s: int = Field(
        30 * 24 * 3600,
        ge=3600,
        description="Retention of a file in seconds, and the longest that `expires_after` of an upload may name",
    )
    max_batch_lines: int = Field(
        64,
        ge=0,
        description="Most lines of batches that one frontend captions at the same time; it runs fewer while captions "
        "wait for the engine. Higher: a large engine is kept busy by batches alone; 0: this frontend runs no batch",
    )
