"""Remote tiers: the contract over several file systems, endpoints that honour less, bad credentials, secrets."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="fsspec is not installed")

from ckptengine.errors import AlreadyExists, CheckpointError, StorageFailed, UnusableRequest
from ckptengine.sources.files import open_files
from ckptengine.sources.target import RemoteTarget
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.redact import Scrubber, for_fsspec, identity_of, redacted_url, secrets_in, split_url
from ckptengine.tiers.remote import RemoteTier
from ckptengine.tiers.retry import Retry

from . import services
from .contract import BIG, PART, TierContract, loop, put_all

__all__ = ["loop"]

QUICK = Retry(attempts=4, first_s=0.01, most_s=0.05, timeout_s=5.0)


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory, loop: IoLoop) -> Iterator[str]:
    with services.moto(tmp_path_factory.mktemp("moto")) as endpoint:
        loop.run(services.make_bucket(endpoint), 30)
        yield endpoint


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with services.gateway(tmp_path_factory.mktemp("gateway")) as endpoint:
        yield endpoint


def s3(loop: IoLoop, endpoint: str, path: str | None = None, retry: Retry = QUICK) -> RemoteTier:
    url = f"s3://ckpt/{path or uuid.uuid4().hex}"
    return loop.run(RemoteTier.open(url, options=services.s3_options(endpoint), retry=retry), 60)


@pytest.fixture(scope="module")
def strict(loop: IoLoop, moto: str) -> Iterator[RemoteTier]:
    tier = s3(loop, moto)
    yield tier
    loop.run(tier.close())


@pytest.fixture(scope="module")
def lax(loop: IoLoop, gateway: str) -> Iterator[RemoteTier]:
    tier = s3(loop, gateway)
    yield tier
    loop.run(tier.close())


def below(opened: RemoteTier) -> RemoteTier:
    """An empty tier over the same connection: making a client takes a while."""
    name = uuid.uuid4().hex
    url, base = f"{opened.label}/{name}", opened.path(name)
    tier = RemoteTier(url, opened.fs, base, opened.abilities, opened._retry, opened._scrubber)
    tier.checks_payload = opened.checks_payload
    return tier


class TestMemoryUrl(TierContract):
    @pytest.fixture
    def tier(self, loop: IoLoop) -> RemoteTier:
        return loop.run(RemoteTier.open(f"memory://{uuid.uuid4().hex}/run"))

    def test_abilities(self, tier: RemoteTier) -> None:
        assert tier.abilities.conditional_put
        assert not tier.abilities.survives_process
        assert not tier.abilities.survives_power_cut


class TestFileUrl(TierContract):
    """Any synchronous file system whose writes show before they are complete."""

    @pytest.fixture
    def tier(self, loop: IoLoop, tmp_path: Path) -> RemoteTier:
        return loop.run(RemoteTier.open(f"file://{tmp_path}/run"))

    def test_abilities(self, tier: RemoteTier) -> None:
        assert not tier.abilities.conditional_put, "looking and then writing is not exclusive"
        assert not tier.abilities.resumable_parts


class TestConditionalS3(TierContract):
    @pytest.fixture
    def tier(self, strict: RemoteTier) -> RemoteTier:
        return below(strict)

    def test_abilities(self, tier: RemoteTier) -> None:
        assert tier.abilities.conditional_put
        assert tier.abilities.resumable_parts


class TestUnconditionalS3(TierContract):
    @pytest.fixture
    def tier(self, lax: RemoteTier) -> RemoteTier:
        return below(lax)

    def test_abilities(self, tier: RemoteTier) -> None:
        assert not tier.abilities.conditional_put
        assert tier.abilities.resumable_parts
        assert tier.checks_payload, "this server refuses what is not what was signed"


def test_probing_leaves_nothing(loop: IoLoop, moto: str, tmp_path: Path) -> None:
    tier = s3(loop, moto, "probed")
    assert loop.run(tier.call("find", "ckpt/probed")) == []
    loop.run(tier.close())
    loop.run(RemoteTier.open(f"file://{tmp_path}/run"))
    assert list((tmp_path / "run").iterdir()) == []


def test_reading_probes_nothing(loop: IoLoop, tmp_path: Path) -> None:
    loop.run(RemoteTier.open(f"file://{tmp_path}/run", writable=False))
    assert list(tmp_path.iterdir()) == []


def test_receipts_of_s3_are_proven(loop: IoLoop, moto: str) -> None:
    tier = s3(loop, moto)

    async def go() -> bool:
        upload = await tier.upload("r.bin", 1000, PART)
        receipt = await upload.put(0, b"x" * 1000)
        await upload.abort()
        return receipt.proven

    assert loop.run(go(), 60)
    loop.run(tier.close())


# -- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["drop", "cut", "500", "503", "swallow"])
def test_passing_trouble_is_survived(loop: IoLoop, moto: str, trouble: str) -> None:
    run = uuid.uuid4().hex
    with services.FlakyProxy(moto, lambda number: trouble if number % 3 == 0 else "") as proxy:
        tier = s3(loop, proxy.endpoint, run, Retry(attempts=12, first_s=0.01, most_s=0.05, timeout_s=10.0))
        flat = BlockingTier(tier, loop)
        for i in range(6):
            flat.create(f"step-000000001/{i}.json", f"content {i}".encode())
        for i in range(6):
            assert flat.read(f"step-000000001/{i}.json", 0, 9) == f"content {i}".encode()
        loop.run(send(tier, "step-000000001/r.bin"), 60)
        assert flat.read("step-000000001/r.bin", 0, len(BIG)) == BIG
        assert proxy.connections > 1
        flat.close()


async def send(tier: RemoteTier, name: str) -> None:
    await put_all(await tier.upload(name, len(BIG), PART), BIG)


def test_an_answer_that_was_lost_is_not_taken_for_another_writer(loop: IoLoop, moto: str) -> None:
    run = uuid.uuid4().hex
    swallowed: list[int] = []

    def trouble(number: int) -> str:
        if armed and not swallowed:
            swallowed.append(number)
            return "swallow"
        return ""

    armed: list[bool] = []
    with services.FlakyProxy(moto, trouble) as proxy:
        tier = s3(loop, proxy.endpoint, run)
        loop.run(tier.close())  # so that the next call makes a new connection
        armed.append(True)
        flat = BlockingTier(tier, loop)
        flat.create("manifest.json", b"the one and only")
        assert swallowed
        with pytest.raises(AlreadyExists):
            flat.create("manifest.json", b"another")
        assert flat.read("manifest.json", 0, 16) == b"the one and only"
        flat.close()


@pytest.mark.parametrize("trouble", ["drop", "500", "503", "stall"])
def test_lasting_trouble_is_a_named_error_in_bounded_time(loop: IoLoop, moto: str, trouble: str) -> None:
    armed: list[bool] = []
    with services.FlakyProxy(moto, lambda _: trouble if armed else "") as proxy:
        tier = s3(loop, proxy.endpoint)
        flat = BlockingTier(tier, loop, timeout_s=20)
        flat.create("good.json", b"good")
        flat.close()
        armed.append(True)
        # Short only where nothing answers: a loaded machine may be slow to hear of what is answered.
        limit_s = 0.25 if trouble == "stall" else QUICK.timeout_s
        tier._retry = Retry(attempts=2, first_s=0.01, most_s=0.02, timeout_s=limit_s)
        for call in (
            lambda: flat.create("new.json", b"x"),
            lambda: flat.read("good.json", 0, 4),
            lambda: flat.entries(),
            lambda: loop.run(send(tier, "r.bin"), 20),
        ):
            with pytest.raises(StorageFailed, match="2 tries") as caught:
                call()
            assert services.SECRET not in str(caught.value)
            assert caught.value.__cause__ is None
        armed.clear()
        tier._retry = QUICK
        assert flat.read("good.json", 0, 4) == b"good"
        flat.close()


def test_nobody_listens(loop: IoLoop) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with pytest.raises(StorageFailed, match="s3://ckpt/run"):
        s3(loop, f"http://127.0.0.1:{services.free_port()}", "run")


def test_wrong_credentials(loop: IoLoop, gateway: str) -> None:
    options = {"key": "nobody", "secret": "wrong-secret-value", "endpoint_url": gateway}
    for writable in (True, False):
        with pytest.raises(StorageFailed, match="credentials") as caught:
            loop.run(look(options, writable), 30)
        assert "wrong-secret-value" not in str(caught.value)


async def look(options: dict[str, object], writable: bool) -> None:
    tier = await RemoteTier.open("s3://ckpt/run", options=options, retry=QUICK, writable=writable)
    try:
        await tier.entries()
    finally:
        await tier.close()


def test_a_missing_bucket(loop: IoLoop, moto: str) -> None:
    options = services.s3_options(moto)
    with pytest.raises(StorageFailed, match="bucket"):
        loop.run(RemoteTier.open("s3://no-such-bucket/run", options=options, retry=QUICK))
    tier = loop.run(RemoteTier.open("s3://no-such-bucket/run", options=options, retry=QUICK, writable=False))
    for call in (tier.entries(), tier.stat("x")):
        with pytest.raises(StorageFailed, match="bucket"):
            loop.run(call)
    loop.run(tier.close())


@pytest.mark.parametrize("url", ["nosuchprotocol://x/y", "s3://", "memory://"])
def test_urls_that_nothing_speaks(loop: IoLoop, url: str) -> None:
    with pytest.raises(UnusableRequest):
        loop.run(RemoteTier.open(url, retry=QUICK))


# -- secrets --------------------------------------------------------------------------------------------------------


def test_credentials_in_the_url_work_and_never_show(
    loop: IoLoop, gateway: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="ckptengine")
    good = f"s3://{services.USER}:{services.SECRET}@ckpt/with-user"
    tier = loop.run(RemoteTier.open(good, options={"endpoint_url": gateway}, retry=QUICK))
    shown = repr(tier) + str(tier) + tier.label + repr(tier._scrubber)
    assert tier.label == "s3://ckpt/with-user"
    BlockingTier(tier, loop).create("a", b"1")
    bad = f"s3://{services.USER}:not-the-secret@ckpt/with-user"
    with pytest.raises(CheckpointError) as caught:
        loop.run(RemoteTier.open(bad, options={"endpoint_url": gateway}, retry=QUICK))
    text = shown + str(caught.value) + repr(caught.value) + caplog.text
    assert services.SECRET not in text
    assert "not-the-secret" not in text
    loop.run(tier.close())


def test_what_reads_a_url_takes_its_credentials_too(
    loop: IoLoop, gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", gateway)
    url = f"s3://{services.USER}:{services.SECRET}@ckpt/{uuid.uuid4().hex}"
    tier = loop.run(RemoteTier.open(url, retry=QUICK))
    BlockingTier(tier, loop).create("a", b"12345")
    loop.run(tier.close())
    target = RemoteTarget.from_url(url)
    target.put("b", b"123")
    assert open_files(url).entries() == ["a", "b"]
    tier = loop.run(RemoteTier.open(url, retry=QUICK))
    BlockingTier(tier, loop).create("c", b"1")
    loop.run(tier.close())
    files = open_files(url)
    assert files.entries() == ["a", "b", "c"], "what came since is seen too"
    assert files.read("a", 1, 2) == b"23"
    assert services.SECRET not in f"{files.root} {target.root}"


@pytest.mark.parametrize("path", ["a*b", "run?1", "a[1]"])
def test_a_path_that_moving_takes_for_a_pattern_is_refused(loop: IoLoop, path: str) -> None:
    with pytest.raises(UnusableRequest, match="pattern"):
        loop.run(RemoteTier.open(f"memory://{uuid.uuid4().hex}/{path}"))


def test_redaction() -> None:
    assert redacted_url("s3://AK:se%2Fcret@bucket/run?sig=abc#x") == "s3://bucket/run"
    assert redacted_url("see https://u:p@h/x?token=t and s3://b/c") == "see https://h/x and s3://b/c"
    assert redacted_url("plain/path@1?") == "plain/path@1?"
    assert split_url("s3://AK:se%2Fcret@bucket/run@2") == ("s3", "s3://bucket/run@2", ("AK", "se/cret"))
    assert split_url("s3://bucket/run@2") == ("s3", "s3://bucket/run@2", None)
    assert redacted_url("s3://AK:se/cr+et@bucket/run") == "s3://bucket/run", "a secret that was not encoded"
    assert split_url("s3://AK:se/cr+et@bucket/run") == ("s3", "s3://bucket/run", ("AK", "se/cr+et"))
    for plain in ("http://host:80/run@2", "s3://arn:aws:s3:eu:1:accesspoint/point/run@2", "s3://bucket/a:b@2"):
        assert redacted_url(plain) == plain
        assert split_url(plain)[1:] == (plain, None)
    nested = {"client_kwargs": {"aws_secret_access_key": "abc/def+ghi"}, "endpoint_url": "http://h", "anon": True}
    assert secrets_in(nested) == ["abc/def+ghi"]
    scrubber = Scrubber(["abc/def+ghi"])
    for form in ("abc/def+ghi", "abc%2Fdef%2Bghi", "abc/def%2Bghi"):
        assert form not in scrubber.scrub(f"failed with {form} at https://x/y?X-Amz-Credential={form}")


def test_secrets_of_the_environment_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hush-hush-token")
    assert Scrubber().scrub("refused hush-hush-token") == "refused ***"


def test_what_fsspec_is_given() -> None:
    keys = {"key": "AK", "secret": "se/cret"}
    assert for_fsspec("s3://AK:se%2Fcret@bucket/run") == ("s3://bucket/run", keys)
    assert for_fsspec("zip::s3://AK:se%2Fcret@bucket/x.zip") == ("zip::s3://bucket/x.zip", {"s3": keys})
    for own in ("ftp://me:pass@host/run", "abfs://container@account.dfs.core.windows.net/run", "s3://bucket/run"):
        assert for_fsspec(own) == (own, {}), "its file system reads them from the URL"


def test_places_are_told_apart_whatever_the_credentials() -> None:
    same = ["s3://bucket/run", "s3://AK:first@bucket/run", "s3://AK:second@bucket/run"]
    assert {identity_of(url) for url in same} == {"s3://bucket/run"}
    assert identity_of("ftp://me:first@host/run") == identity_of("ftp://me:second@host/run")
    others = [
        "s3://bucket/run#1",
        "s3://bucket/run#2",
        "s3://bucket/run?1",
        "abfs://a@account/run",
        "abfs://b@account/run",
    ]
    assert len({identity_of(url) for url in others}) == len(others)
    assert identity_of("https://host/run?sig=first") == identity_of("https://host/run?sig=second")
