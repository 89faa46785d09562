"""Settings of the bucket in which uploaded files are kept."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, Field, SecretStr, model_validator

from serving.settings.types import Example

_FORMS = {"s3": "s3://bucket/prefix", "gs": "gs://bucket/prefix", "az": "az://account/container/prefix"}


class ObjectStore(BaseModel):
    """Bucket of uploaded files, so that frontends share no disk."""

    object_store_url: Annotated[str | None, Example("s3://captions/production")] = Field(
        None,
        description="Bucket of uploaded files, with an optional prefix: `s3://bucket/prefix` (S3 and what is "
        "compatible with it, Alibaba OSS too), `gs://bucket/prefix` or `az://account/container/prefix`. "
        "Unset: uploads_dir",
    )
    object_store_endpoint: Annotated[str | None, Example("https://s3.oss-cn-beijing.aliyuncs.com")] = Field(
        None,
        description="Origin of the object store; `http://` sends files unencrypted. Unset: the provider's public one",
    )
    object_store_region: Annotated[str | None, Example("cn-beijing")] = Field(
        None, description="Region of an S3-compatible bucket. Unset: AWS_REGION, else us-east-1"
    )
    object_store_virtual_host: bool = Field(
        default=False,
        description="Bucket's name in the host name of object_store_endpoint rather than in the path, as Alibaba OSS "
        "requires",
    )
    object_store_access_key_id: SecretStr | None = Field(
        None, description="Access key id of S3. Unset: what is said of object_store_secret_key"
    )
    object_store_secret_key: SecretStr | None = Field(
        None,
        description="Secret access key of S3, account key of Azure, or JSON key of a Google service account. "
        "Unset: the identity of the machine or pod, or the provider's variables (AWS_…, AZURE_…, GOOGLE_…)",
    )
    object_store_timeout_s: float = Field(
        30,
        gt=0,
        description="Time in seconds for storing or reading one file, retries included, and a second more for each MiB "
        "of it; then the request gets 503",
    )

    @model_validator(mode="after")
    def _bucket_is_named(self) -> Self:
        if self.object_store_url is None:
            return self
        parts = _split(self.object_store_url)
        form = _FORMS.get(parts.scheme)
        if form is None:
            raise ValueError(f"object_store_url: begins with none of s3://, gs://, az://; {_REMEDY} {_FORMS['s3']}")
        path = parts.path.strip("/")
        folders = path.split("/") if path else []
        named = parts.hostname and parts.netloc == parts.hostname and not {"", ".", ".."} & set(folders)
        if not named or parts.query or parts.fragment:
            raise ValueError(f"object_store_url: is not of the form {form}; {_REMEDY} {form}")
        if parts.scheme == "az" and not folders:
            raise ValueError(f"object_store_url: names no container; {_REMEDY} {form}")
        return self

    @model_validator(mode="after")
    def _endpoint_is_an_origin(self) -> Self:
        if self.object_store_endpoint is None:
            return self
        parts = _split(self.object_store_endpoint)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError("object_store_endpoint: is no origin; set it to https://host or https://host:port")
        return self

    @model_validator(mode="after")
    def _keys_come_in_pairs(self) -> Self:
        key_id, secret = (
            bool(each and each.get_secret_value())  # a file without text is no key
            for each in (self.object_store_access_key_id, self.object_store_secret_key)
        )
        if (self.object_store_url or "").startswith("s3:") and key_id != secret:
            raise ValueError(
                "object_store_secret_key: is of use only with object_store_access_key_id; set both, or neither"
            )
        if self.object_store_virtual_host and self.object_store_endpoint is None:
            raise ValueError("object_store_virtual_host: requires object_store_endpoint; set it, or leave it off")
        return self


_REMEDY = "set it to"


def _split(url: str) -> SplitResult:
    """Split a URL; one that is none has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
