"""What stores that nobody may write to have in common."""

from __future__ import annotations

from typing import NoReturn

from zarr.abc.store import Store
from zarr.core.buffer import Buffer

from ckptengine.errors import UnusableRequest


class ReadOnlyStore(Store):
    """A zarr store that lists and reads; every attempt to write raises `UnusableRequest` with ``refusal``."""

    refusal: str

    def __init__(self, refusal: str) -> None:
        super().__init__(read_only=True)
        self.refusal = refusal

    def _refuse(self) -> NoReturn:
        raise UnusableRequest(self.refusal)

    async def set(self, key: str, value: Buffer) -> None:
        self._refuse()

    async def delete(self, key: str) -> None:
        self._refuse()

    def with_read_only(self, read_only: bool = False) -> Store:
        if not read_only:
            self._refuse()
        return self

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_listing(self) -> bool:
        return True
