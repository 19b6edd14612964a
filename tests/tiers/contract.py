"""What every tier does, whatever it is made of: a test file of a tier adds fixtures to this class."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from ckptengine.errors import AlreadyExists, CheckpointError, NotFound, Truncated, UnusableRequest
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.port import Entry, Receipt, TierPort, Upload

PART = 5 << 20
"""The smallest part that S3 takes."""


def pattern(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes in which every 8-byte word tells where it is."""
    words = -(-size_bytes // 8)
    return b"".join((i * 0x9E3779B97F4A7C15 + seed & (1 << 64) - 1).to_bytes(8, "little") for i in range(words))[
        :size_bytes
    ]


BIG = (pattern(1 << 16) * ((2 * PART >> 16) + 1))[: 2 * PART + 12345]


@pytest.fixture(scope="module")
def loop() -> Iterator[IoLoop]:
    loop = IoLoop(threads=4, name="contract-io")  # a name of its own: other tests of this process have loops too
    yield loop
    loop.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("contract-io")]


class TierContract:
    """Give a fixture ``tier``: an empty `TierPort`, writable."""

    @pytest.fixture
    def flat(self, tier: TierPort, loop: IoLoop) -> BlockingTier:
        return BlockingTier(tier, loop, timeout_s=60)

    def send(self, loop: IoLoop, tier: TierPort, name: str, data: bytes, order: list[int] | None = None) -> None:
        async def go() -> None:
            upload = await tier.upload(name, len(data), PART)
            await put_all(upload, data, order)

        loop.run(go(), 60)

    def test_empty(self, flat: BlockingTier) -> None:
        assert flat.entries() == []
        assert flat.entries("step-000000001/") == []
        assert flat.stat("step-000000001/a.bin") is None

    def test_create_then_read(self, flat: BlockingTier) -> None:
        data = pattern(100_003)
        flat.create("step-000000001/a.json", data)
        assert flat.stat("step-000000001/a.json") == Entry("step-000000001/a.json", len(data))
        assert flat.read("step-000000001/a.json", 0, len(data)) == data
        assert flat.read("step-000000001/a.json", 77, 1000) == data[77:1077]
        assert flat.read("step-000000001/a.json", len(data), 0) == b""
        view = bytearray(500)
        flat.read_into("step-000000001/a.json", 99, memoryview(view))
        assert view == data[99:599]

    def test_an_empty_object_exists(self, flat: BlockingTier) -> None:
        flat.create("attempts/000001.claim", b"")
        assert flat.stat("attempts/000001.claim") == Entry("attempts/000001.claim", 0)
        assert flat.read("attempts/000001.claim", 0, 0) == b""

    def test_create_never_overwrites(self, flat: BlockingTier) -> None:
        flat.create("m.json", b"first")
        with pytest.raises(AlreadyExists):
            flat.create("m.json", b"second")
        assert flat.read("m.json", 0, 5) == b"first"

    def test_of_many_creators_one_wins(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        if not tier.abilities.conditional_put:
            pytest.skip("this tier does not promise it")

        async def race() -> list[object]:
            tries = [tier.create("attempts/000002.claim", f"writer {i}".encode()) for i in range(8)]
            return list(await asyncio.gather(*tries, return_exceptions=True))

        results = loop.run(race(), 60)
        winners = [i for i, result in enumerate(results) if result is None]
        assert len(winners) == 1
        assert all(isinstance(result, AlreadyExists) for i, result in enumerate(results) if i != winners[0])
        said = f"writer {winners[0]}".encode()
        assert flat.read("attempts/000002.claim", 0, len(said)) == said

    def test_list_by_prefix_in_order(self, flat: BlockingTier) -> None:
        names = ["attempts/1.json", "step-000000001/b.bin", "step-000000001/a.bin", "step-000000010/a.bin"]
        for name in names:
            flat.create(name, name.encode())
        assert flat.entries() == [Entry(name, len(name)) for name in sorted(names)]
        assert [e.name for e in flat.entries("step-000000001/")] == ["step-000000001/a.bin", "step-000000001/b.bin"]
        assert [e.name for e in flat.entries("step-0000000")] == sorted(names)[1:]
        assert [e.name for e in flat.entries("step-000000001/a")] == ["step-000000001/a.bin"]

    def test_missing_and_short(self, flat: BlockingTier) -> None:
        with pytest.raises(NotFound, match="gone"):
            flat.read("gone.bin", 0, 1)
        flat.create("short.bin", b"12345")
        with pytest.raises(Truncated, match="short"):
            flat.read("short.bin", 3, 3)
        with pytest.raises(Truncated):
            flat.read_into("short.bin", 9, memoryview(bytearray(1)))

    def test_delete(self, flat: BlockingTier) -> None:
        flat.create("step-000000003/a.bin", b"x")
        flat.delete("step-000000003/a.bin")
        flat.delete("step-000000003/a.bin")
        assert flat.stat("step-000000003/a.bin") is None
        assert flat.entries() == []

    def test_unsafe_names_are_refused(self, flat: BlockingTier) -> None:
        for name in ("../x", "/etc/x", "a/../b", "a//b", "", ".", "a/", ".hidden", "a\x00b", "a b"):
            for call in (
                lambda name=name: flat.create(name, b""),
                lambda name=name: flat.read(name, 0, 1),
                lambda name=name: flat.delete(name),
                lambda name=name: flat.stat(name),
            ):
                with pytest.raises(UnusableRequest):
                    call()

    def test_negative_ranges_are_refused(self, flat: BlockingTier) -> None:
        flat.create("a.bin", b"12345")
        for offset, size in ((-1, 1), (0, -1)):
            with pytest.raises(UnusableRequest):
                flat.read("a.bin", offset, size)

    def test_upload_in_parts(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        order = [2, 0, 1] if tier.abilities.resumable_parts else [0, 1, 2]
        self.send(loop, tier, "step-000000005/rank.bin", BIG, order)
        assert flat.entries() == [Entry("step-000000005/rank.bin", len(BIG))]
        assert flat.read("step-000000005/rank.bin", 0, len(BIG)) == BIG
        assert flat.read("step-000000005/rank.bin", PART - 5, 10) == BIG[PART - 5 : PART + 5]

    def test_parts_sent_at_once(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        async def go() -> None:
            upload = await tier.upload("r.bin", len(BIG), PART)
            parts = [(i, BIG[i * PART : (i + 1) * PART]) for i in range(3)]
            receipts = await asyncio.gather(*(upload.put(i, part) for i, part in parts))
            await upload.finish(dict(enumerate(receipts)))

        loop.run(go(), 60)
        assert flat.read("r.bin", 0, len(BIG)) == BIG

    def test_an_upload_of_nothing(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        self.send(loop, tier, "empty.bin", b"")
        assert flat.stat("empty.bin") == Entry("empty.bin", 0)

    def test_an_unfinished_upload_is_not_there(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        async def begin() -> Upload:
            upload = await tier.upload("step-000000006/r.bin", len(BIG), PART)
            await upload.put(0, BIG[:PART])
            return upload

        upload = loop.run(begin(), 60)
        assert flat.stat("step-000000006/r.bin") is None
        assert flat.entries() == []
        loop.run(upload.abort(), 60)
        flat.sweep("step-000000006/")
        assert flat.entries() == []

    def test_finish_needs_every_part(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        async def go() -> None:
            upload = await tier.upload("r.bin", len(BIG), PART)
            receipt = await upload.put(0, BIG[:PART])
            try:
                await upload.finish({0: receipt})
            finally:
                await upload.abort()

        with pytest.raises(CheckpointError, match="parts"):
            loop.run(go(), 60)
        assert flat.stat("r.bin") is None

    def test_resume_sends_only_what_is_missing(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        if not tier.abilities.resumable_parts:
            pytest.skip("this tier cannot resume")

        async def first() -> tuple[str, Receipt]:
            upload = await tier.upload("step-000000007/r.bin", len(BIG), PART)
            receipt = await upload.put(1, BIG[PART : 2 * PART])
            await upload.release()
            return upload.token, receipt

        async def second(token: str, receipt: Receipt) -> None:
            upload = await tier.upload("step-000000007/r.bin", len(BIG), PART, token)
            receipts = {1: receipt, 0: await upload.put(0, BIG[:PART]), 2: await upload.put(2, BIG[2 * PART :])}
            await upload.finish(receipts)

        token, receipt = loop.run(first(), 60)
        loop.run(second(token, Receipt(receipt.tag, receipt.proven)), 60)
        assert flat.read("step-000000007/r.bin", 0, len(BIG)) == BIG

    def test_resume_of_what_was_swept(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        if not tier.abilities.resumable_parts:
            pytest.skip("this tier cannot resume")

        async def first() -> str:
            upload = await tier.upload("step-000000008/r.bin", len(BIG), PART)
            await upload.put(0, BIG[:PART])
            await upload.release()
            return upload.token

        token = loop.run(first(), 60)
        flat.create("step-000000009/keep.bin", b"kept")
        assert flat.sweep("step-000000009/") == []
        assert flat.sweep("step-", lambda name: name == "step-000000008/r.bin") == []
        assert len(flat.sweep("step-000000008/")) == 1
        with pytest.raises(NotFound):
            loop.run(tier.upload("step-000000008/r.bin", len(BIG), PART, token), 60)
        assert flat.entries() == [Entry("step-000000009/keep.bin", 4)]

    def test_uploading_over_an_existing_name(self, flat: BlockingTier, tier: TierPort, loop: IoLoop) -> None:
        flat.create("r.bin", b"the first one")
        with pytest.raises(AlreadyExists):
            self.send(loop, tier, "r.bin", BIG)
        assert flat.read("r.bin", 0, 13) == b"the first one"
        flat.sweep("")
        assert flat.entries() == [Entry("r.bin", 13)]


async def put_all(upload: Upload, data: bytes, order: list[int] | None = None) -> None:
    """Send ``data`` part by part and publish it; nothing is left behind when that fails."""
    receipts: dict[int, Receipt] = {}
    try:
        for part in order or range(-(-len(data) // PART)):
            receipts[part] = await upload.put(part, data[part * PART : (part + 1) * PART])
        await upload.finish(receipts)
    except BaseException:
        await upload.abort()
        raise
