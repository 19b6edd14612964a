"""Multipart uploads of S3: parts in parallel and any order, resumed by another process, published by one call."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from ckptengine.errors import AlreadyExists, NotFound, UnusableRequest
from ckptengine.tiers.part_body import Changeling, PartBody
from ckptengine.tiers.port import Abilities, Bytes, Entry, Receipt, Spare

MIN_PART_BYTES = 5 << 20
MAX_PARTS = 10_000


class S3Place(Protocol):
    """What this module needs of `ckptengine.tiers.remote.RemoteTier`."""

    fs: Any
    checks_payload: bool

    @property
    def label(self) -> str: ...
    @property
    def abilities(self) -> Abilities: ...
    async def stat(self, name: str) -> Entry | None: ...
    async def create(self, name: str, data: Bytes) -> None: ...
    async def guard(self, action: str, name: str, attempt: Any) -> Any: ...


async def checks_payload(fs: Any, path: str) -> bool:
    """Whether the server refuses an object whose content is not what was signed; tried with a tiny one at ``path``.

    Such a server proves each part on arrival: what it acknowledges has the SHA-256 that was computed here.
    """
    bucket, _, key = path.partition("/")
    try:
        await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=Changeling(b"signed", b"sent!!"))
    except OSError:
        return True
    return False


async def begin_multipart(
    tier: S3Place, name: str, path: str, size_bytes: int, part_bytes: int, token: str | None
) -> S3Upload:
    """Start an upload, or go on with the one that ``token`` names; `NotFound` where the server does not know it."""
    parts = -(-size_bytes // part_bytes)
    if parts > MAX_PARTS or (parts > 1 and part_bytes < MIN_PART_BYTES):
        raise UnusableRequest(
            f"{name}: {parts} parts of {part_bytes} bytes; S3 takes {MAX_PARTS} of at least {MIN_PART_BYTES}"
        )
    bucket, _, key = path.partition("/")

    async def begin(_: int) -> str:
        if token is None:
            return str((await tier.fs._call_s3("create_multipart_upload", Bucket=bucket, Key=key))["UploadId"])
        try:
            await tier.fs._call_s3("list_parts", Bucket=bucket, Key=key, UploadId=token, MaxParts=1)
        except FileNotFoundError:
            raise NotFound(f"the unfinished upload of {tier.label}/{name} is gone; start anew") from None
        return token

    upload_id = "" if parts == 0 else await tier.guard("write", name, begin)
    return S3Upload(tier, name, (bucket, key), upload_id, size_bytes, part_bytes)


class S3Upload:
    """One multipart upload.

    A part is proven where the server checks the signed SHA-256 of what it gets, or else where the ETag that it
    answers is the MD5 of what was sent.
    """

    def __init__(
        self, tier: S3Place, name: str, place: tuple[str, str], upload_id: str, size_bytes: int, part_bytes: int
    ) -> None:
        self.token = upload_id
        self._tier = tier
        self._name = name
        self._where = {"Bucket": place[0], "Key": place[1]}
        self._size_bytes = size_bytes
        self._parts = -(-size_bytes // part_bytes)

    async def put(self, part: int, data: Bytes) -> Receipt:
        if not 0 <= part < self._parts:
            raise UnusableRequest(f"part {part} of {self._name} lies outside its {self._parts} parts")
        whole = data if isinstance(data, bytes) else bytes(data)

        async def send(_: int) -> str:
            # A fresh reader over the same memory for every try.
            answer = await self._tier.fs._call_s3(
                "upload_part", **self._where, UploadId=self.token, PartNumber=part + 1, Body=PartBody(whole)
            )
            return str(answer["ETag"])

        if self._tier.checks_payload:
            return Receipt(await self._tier.guard("write", self._name, send), proven=True)
        digest = asyncio.create_task(asyncio.to_thread(_md5, whole))
        try:
            tag = await self._tier.guard("write", self._name, send)
        finally:
            expected = await digest
        return Receipt(tag, proven=tag.strip('"') == expected)

    async def finish(self, receipts: Mapping[int, Receipt]) -> None:
        if sorted(receipts) != list(range(self._parts)):
            raise UnusableRequest(f"{self._name} has {len(receipts)} of its {self._parts} parts; it cannot be finished")
        if self._parts == 0:
            await self._tier.create(self._name, b"")
            return
        parts = [{"PartNumber": part + 1, "ETag": receipts[part].tag} for part in range(self._parts)]
        exclusive: dict[str, Any] = {"IfNoneMatch": "*"} if self._tier.abilities.conditional_put else {}

        async def publish(failures: int) -> None:
            if not exclusive and not failures and await self._tier.stat(self._name) is not None:
                raise AlreadyExists(f"{self._tier.label}/{self._name} exists already and is never overwritten")
            try:
                await self._tier.fs._call_s3(
                    "complete_multipart_upload",
                    **self._where,
                    UploadId=self.token,
                    MultipartUpload={"Parts": parts},
                    **exclusive,
                )
            except (FileNotFoundError, FileExistsError):
                # Published by an earlier try whose answer was lost: the upload is gone and the object is there.
                entry = await self._tier.stat(self._name) if failures else None
                if entry is None or entry.size_bytes != self._size_bytes:
                    raise

        await self._tier.guard("publish", self._name, publish)

    async def release(self) -> None:
        """Nothing is held here; the server keeps the parts."""

    async def abort(self) -> None:
        if not self.token:
            return
        await self._tier.guard("abandon", self._name, lambda _: _abort(self._tier.fs, self._where, self.token))


async def sweep_multipart(tier: S3Place, base: str, prefix: str, spare: Spare) -> list[str]:
    """Abort unfinished uploads of objects beneath ``base`` (bucket and path) whose name begins with ``prefix``."""
    bucket, _, folder = base.partition("/")
    beneath = f"{folder}/" if folder else ""
    key_prefix = beneath + prefix

    async def find(_: int) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        marker: dict[str, str] = {}
        while True:
            page = await tier.fs._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key_prefix, **marker)
            found += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", [])]
            if not page.get("IsTruncated"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    removed = []
    for key, upload_id in await tier.guard("list the unfinished uploads of", "", find):
        if key.startswith(key_prefix) and not spare(key[len(beneath) :]):
            where = {"Bucket": bucket, "Key": key}
            await tier.guard("abandon", key, lambda _, w=where, u=upload_id: _abort(tier.fs, w, u))
            removed.append(key[len(beneath) :])
    return removed


async def _abort(fs: Any, where: Mapping[str, str], upload_id: str) -> None:
    try:
        await fs._call_s3("abort_multipart_upload", **where, UploadId=upload_id)
    except FileNotFoundError:
        return


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
