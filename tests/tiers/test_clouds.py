"""Google Cloud Storage and Azure Blob Storage through fsspec, against emulators where they are installed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fsspec", reason="fsspec is not installed")

from ckptengine.tiers.loop import IoLoop
from ckptengine.tiers.remote import RemoteTier
from ckptengine.tiers.retry import Retry

from . import services
from .contract import TierContract, loop

__all__ = ["loop"]

QUICK = Retry(attempts=4, first_s=0.01, most_s=0.05, timeout_s=20.0)


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with services.google(tmp_path_factory.mktemp("google")) as options:
        yield options


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory, loop: IoLoop) -> Iterator[dict[str, Any]]:
    with services.azure(tmp_path_factory.mktemp("azure")) as options:

        async def bucket() -> None:
            tier = await RemoteTier.open("az://ckpt/x", options=options, writable=False)
            await tier.call("mkdir", "ckpt")
            await tier.close()

        loop.run(bucket(), 60)
        yield options


# Both libraries do.
QUIET = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


@QUIET
class TestGoogle(TierContract):
    @pytest.fixture(autouse=True)
    def _is_emulated(self, request: pytest.FixtureRequest) -> None:
        gives_up = ("test_an_unfinished_upload_is_not_there", "test_finish_needs_every_part")
        if request.node.name in (*gives_up, "test_uploading_over_an_existing_name"):
            pytest.skip("the emulator answers 501 where an upload is given up; the service takes it")

    @pytest.fixture
    def tier(self, loop: IoLoop, google: dict[str, Any]) -> Iterator[RemoteTier]:
        tier = loop.run(RemoteTier.open(f"gs://ckpt/{uuid.uuid4().hex}", options=google, retry=QUICK), 60)
        yield tier
        loop.run(tier.close(), 20)


@QUIET
class TestAzure(TierContract):
    @pytest.fixture
    def tier(self, loop: IoLoop, azure: dict[str, Any]) -> Iterator[RemoteTier]:
        tier = loop.run(RemoteTier.open(f"az://ckpt/{uuid.uuid4().hex}", options=azure, retry=QUICK), 60)
        yield tier
        loop.run(tier.close(), 20)
