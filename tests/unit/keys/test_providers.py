"""Several providers as one: a slow one is cut off, an unknown one named, all of them closed."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import structlog

from glamd.errors import CryptoError, UnavailableError
from glamd.keys.providers import interface
from glamd.keys.providers.interface import KeptBdk, KeyProvider, ProviderName, Providers
from glamd.keys.providers.local import LocalProvider, create_kek_file


class Silent(KeyProvider):
    """Never answers, whatever it is asked, and does not let go either."""

    @property
    def name(self) -> ProviderName:
        return "pkcs11"

    async def wrap(self, key: bytes, *, context: str) -> bytes:
        return await self._never()

    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        return await self._never()

    async def is_current(self, wrapped: bytes, *, context: str) -> bool:
        return bool(await self._never())

    async def keep_bdk(self, bdk: bytes, *, scheme: str, context: str) -> KeptBdk:
        return KeptBdk(wrapped=await self._never())

    async def bdk_kcv(self, hsm_label: str, *, scheme: str) -> str:
        return (await self._never()).hex()

    async def initial_key(self, bdk: KeptBdk, *, scheme: str, ksn: bytes, context: str) -> bytes:
        return await self._never()

    async def health(self) -> None:
        await self._never()

    async def close(self) -> None:
        await self._never()

    async def _never(self) -> bytes:
        await asyncio.Event().wait()
        return b""


BDK = KeptBdk(hsm_label="label")
CALLS: list[Callable[[KeyProvider], Awaitable[object]]] = [
    lambda p: p.wrap(b"key", context="audit:v1"),
    lambda p: p.unwrap(b"key", context="audit:v1"),
    lambda p: p.is_current(b"key", context="audit:v1"),
    lambda p: p.keep_bdk(b"key", scheme="aes-dukpt", context="bdk:a"),
    lambda p: p.bdk_kcv("label", scheme="aes-dukpt"),
    lambda p: p.initial_key(BDK, scheme="aes-dukpt", ksn=bytes(12), context="bdk:a"),
    lambda p: p.health(),
]


@pytest.mark.parametrize("call", CALLS)
async def test_whatever_a_provider_is_asked_it_has_only_so_long(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[KeyProvider], Awaitable[object]]
) -> None:
    monkeypatch.setattr(interface, "TIMEOUT_S", 0.01)
    with pytest.raises(UnavailableError, match="key provider pkcs11 does not answer in time"):
        await call(Providers(Silent()).current)


async def test_a_provider_that_does_not_let_go_keeps_nobody_from_stopping(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(interface, "TIMEOUT_S", 0.01)
    create_kek_file(tmp_path / "kek")
    providers = Providers(LocalProvider(tmp_path / "kek"), former=[Silent()])
    with structlog.testing.capture_logs() as logs:
        await providers.close()
    assert [(entry["event"], entry["provider"]) for entry in logs] == [
        ("key_provider_not_closed", "pkcs11")
    ]


def test_a_provider_that_is_not_configured_is_named() -> None:
    with pytest.raises(CryptoError, match=r"aws-kms, which is not configured; .*former_providers"):
        Providers(Silent()).by_name("aws-kms")
    assert Providers(Silent()).by_name("pkcs11").name == "pkcs11"
