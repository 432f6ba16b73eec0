"""Rewrapping on a real PostgreSQL: what fails, what is cut short, a live move over all three."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
from prometheus_client import REGISTRY
from typing_extensions import override

from glamd.crypto import dukpt
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT, Profile
from glamd.db import Database
from glamd.errors import ConfigError, CryptoError, UnavailableError
from glamd.keys.key_sets.service import Keys
from glamd.keys.keyrings import Keyrings, platform_tokens
from glamd.keys.providers.aws_kms import AwsKmsProvider, KmsSettings
from glamd.keys.providers.interface import KeyProvider, ProviderName, Providers
from glamd.keys.providers.local import LocalProvider, create_kek_file
from glamd.keys.providers.pkcs11 import Pkcs11Provider
from glamd.keys.rewrapping.service import Rewrapped, Rewrapper
from tests.support.keys import Recorded
from tests.support.kms import REGION, MotoKms
from tests.support.settable_clock import SettableClock

CLOCK = SettableClock()
BDKS = {
    "lane-tdes": (TDES_DUKPT, bytes.fromhex("0123456789ABCDEFFEDCBA9876543210"), 10),
    "lane-aes": (AES_DUKPT, bytes.fromhex("FEDCBA9876543210F1F1F1F1F1F1F1F1") * 2, 12),
}
NAMES = [
    "audit:v1",
    "fingerprints:v1",
    "payment-tokens:v1",
    "platform-tokens:v1",
    "bdk:lane-aes",
    "bdk:lane-tdes",
]


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each: much cheaper than one each."""
    connection = await asyncpg.connect(module_database_url)
    await connection.execute(
        "DELETE FROM cde.encryption_keys; DELETE FROM glam.encryption_keys;DELETE FROM cde.key_sets"
    )
    await connection.close()
    return module_database_url


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def local(tmp_path: Path) -> Callable[[str], LocalProvider]:
    """Makes providers `local`, each KEK by its name."""

    def make(name: str, *former: str) -> LocalProvider:
        for file in (name, *former):
            create_kek_file(tmp_path / file)
        return LocalProvider(tmp_path / name, former=[tmp_path / file for file in former])

    return make


class Node:
    """What of a running daemon knows keys: keyrings in memory, key sets by the provider."""

    def __init__(self, database: Database, providers: Providers, recorded: Recorded) -> None:
        self.providers = providers
        self.keyrings = Keyrings(database=database, providers=providers)
        self.platform_tokens = platform_tokens(database=database, providers=providers)
        self.keys = Keys(
            database=database,
            glam=database,
            providers=providers,
            identity_key=bytes(32),
            record=recorded,
            clock=CLOCK,
        )
        self.rewrapper = Rewrapper(
            database=database, glam=database, providers=providers, record=recorded
        )

    async def load(self) -> "Node":
        for keyring in (*self.keyrings.all(), self.platform_tokens):
            await keyring.load(CLOCK, "v1")
        return self

    async def import_bdks(self) -> None:
        for name, (scheme, bdk, _) in BDKS.items():
            await self.keys.import_bdk(
                key_set=name, profile=Profile(scheme=scheme), bdk=bdk, actor="uid:0"
            )

    def seal(self) -> bytes:
        return self.keyrings.payment_tokens.active.sealer.seal(b"4111", associated_data=b"ptk_1")

    async def opens(self, sealed: bytes) -> None:
        """Whatever was sealed before opens, and devices get the keys that they always got."""
        key = await self.keyrings.payment_tokens.version("v1")
        assert key.sealer.open_sealed(sealed, associated_data=b"ptk_1") == b"4111"
        for name, (scheme, bdk, length) in BDKS.items():
            ksn = bytes(range(length - 4)) + bytes(4)
            found = await self.keys.initial_key(name, ksn)
            assert found.key == dukpt.initial_key(scheme, bdk, ksn)


async def node(
    database: Database,
    recorded: Recorded,
    current: KeyProvider,
    *former: KeyProvider,
) -> Node:
    return await Node(database, Providers(current, former=former), recorded).load()


def outcomes(keys: tuple[Rewrapped, ...]) -> dict[str, str]:
    return {key.key: key.outcome for key in keys}


async def wrapped_rows(database: Database) -> list[tuple[str, str, bytes | None]]:
    rows = await database.fetch(
        "SELECT keyring AS name, provider, wrapped_key AS wrapped FROM cde.encryption_keys "
        "UNION ALL SELECT keyring, provider, wrapped_key FROM glam.encryption_keys "
        "UNION ALL SELECT key_set, provider, wrapped_bdk FROM cde.key_sets ORDER BY 1"
    )
    return [(row["name"], row["provider"], row["wrapped"]) for row in rows]


# ---- what goes wrong


async def test_keys_of_another_kek_are_listed_and_the_rest_goes_on(
    database: Database, recorded: Recorded, local: Callable[..., LocalProvider]
) -> None:
    first = await node(database, recorded, local("a"))
    await first.import_bdks()
    strange = await local("stranger").wrap(bytes(32), context="audit:v1")
    await database.execute(
        "UPDATE cde.encryption_keys SET wrapped_key = $1 WHERE keyring = 'audit'", strange
    )
    await database.execute("UPDATE cde.key_sets SET provider = 'pkcs11' WHERE key_set = 'lane-aes'")
    providers = Providers(local("b", "a"))
    rewrapper = Rewrapper(database=database, glam=database, providers=providers, record=recorded)
    report = await rewrapper.rewrap("uid:0")
    assert report.count("failed") == 2
    assert report.count("rewrapped") == 4
    reasons = {key.key: key.reason for key in report.keys if key.outcome == "failed"}
    assert reasons["audit:v1"] is not None
    assert "does not open under this key-encryption key" in reasons["audit:v1"]
    assert reasons["bdk:lane-aes"] is not None
    assert "name it in keys.former_providers" in reasons["bdk:lane-aes"]
    assert sorted(recorded.rewraps()) == sorted(
        (name, "CRYPTO_ERROR" if name in reasons else "ok") for name in NAMES
    )
    assert ("audit", "local", strange) in await wrapped_rows(database)
    states = await rewrapper.providers()
    assert [(s.name, s.configured, s.keys) for s in states] == [
        ("local", True, 5),
        ("pkcs11", False, 1),
    ]


async def test_a_key_that_does_not_fit_its_check_value_is_left_as_it_is(
    database: Database, recorded: Recorded, local: Callable[..., LocalProvider]
) -> None:
    await (await node(database, recorded, local("a"))).import_bdks()
    await database.execute("UPDATE cde.encryption_keys SET kcv = '000000'")
    await database.execute("UPDATE cde.key_sets SET kcv = '000000'")
    before = await wrapped_rows(database)
    rewrapper = Rewrapper(
        database=database, glam=database, providers=Providers(local("b", "a")), record=recorded
    )
    report = await rewrapper.rewrap("uid:0")
    assert report.count("failed") == 5
    assert all("check value 000000" in (k.reason or "") for k in report.keys if k.reason)
    changed = set(before) ^ set(await wrapped_rows(database))
    assert {name for name, _, _ in changed} == {"platform-tokens"}


class Hindered(LocalProvider):
    """Does what a test says before it wraps or unwraps."""

    before_wrap: Callable[[], Awaitable[None]] | None = None
    cannot_unwrap = False
    away = False

    @override
    async def wrap(self, key: bytes, *, context: str) -> bytes:
        if self.before_wrap is not None:
            await self.before_wrap()
        return await super().wrap(key, context=context)

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        if self.cannot_unwrap:
            raise CryptoError("AWS KMS refuses Decrypt with the key alias/glamd")
        return await super().unwrap(wrapped, context=context)

    @override
    async def health(self) -> None:
        if self.away:
            raise UnavailableError("It is away.")


@pytest.fixture
def hindered(tmp_path: Path) -> Hindered:
    for name in ("a", "b"):
        create_kek_file(tmp_path / name)
    return Hindered(tmp_path / "b", former=[tmp_path / "a"])


class Other(Hindered):
    """The same under another provider's name, so that the two are apart."""

    @property
    @override
    def name(self) -> ProviderName:
        return "aws-kms"


async def test_a_provider_that_is_away_is_found_before_anything_is_touched(
    database: Database,
    recorded: Recorded,
    local: Callable[..., LocalProvider],
    hindered: Hindered,
) -> None:
    await node(database, recorded, local("a"))
    before = await wrapped_rows(database)
    hindered.away = True
    moving = Node(database, Providers(hindered), recorded)
    with pytest.raises(UnavailableError, match="It is away"):
        await moving.rewrapper.rewrap("uid:0")
    assert await wrapped_rows(database) == before
    assert not recorded.rewraps()


async def test_a_provider_that_wraps_and_may_not_unwrap_gets_no_key(
    database: Database,
    recorded: Recorded,
    local: Callable[..., LocalProvider],
    tmp_path: Path,
) -> None:
    await (await node(database, recorded, local("a"))).import_bdks()
    before = await wrapped_rows(database)
    create_kek_file(tmp_path / "b")
    other = Other(tmp_path / "b")
    other.cannot_unwrap = True
    moving = Node(database, Providers(other, former=[local("a")]), recorded)
    report = await moving.rewrapper.rewrap("uid:0")
    assert report.count("failed") == len(NAMES)
    assert await wrapped_rows(database) == before


async def test_without_its_audit_row_no_key_is_moved(
    database: Database,
    recorded: Recorded,
    local: Callable[..., LocalProvider],
    hindered: Hindered,
) -> None:
    await node(database, recorded, local("a"))
    before = await wrapped_rows(database)
    recorded.error = UnavailableError("The audit cannot be written.")
    with pytest.raises(UnavailableError, match="audit"):
        await Node(database, Providers(hindered), recorded).rewrapper.rewrap("uid:0")
    assert await wrapped_rows(database) == before


async def test_a_key_that_is_destroyed_at_the_same_moment_does_not_come_back(
    database: Database,
    recorded: Recorded,
    local: Callable[..., LocalProvider],
    hindered: Hindered,
) -> None:
    await node(database, recorded, local("a"))

    async def destroy() -> None:
        hindered.before_wrap = None
        await database.execute(
            "UPDATE cde.encryption_keys SET wrapped_key = NULL, status = 'destroyed' "
            "WHERE keyring = 'audit'"
        )

    hindered.before_wrap = destroy
    report = await Node(database, Providers(hindered), recorded).rewrapper.rewrap("uid:0")
    assert outcomes(report.keys)["audit:v1"] == "changed"
    assert report.count("rewrapped") == 3
    assert ("audit", "local", None) in await wrapped_rows(database)
    assert "audit:v1" not in dict(recorded.rewraps())


async def test_a_rewrap_cut_in_the_middle_is_resumed_and_nodes_load_in_between(
    database: Database,
    recorded: Recorded,
    local: Callable[..., LocalProvider],
    hindered: Hindered,
) -> None:
    running = await node(database, recorded, local("a"))
    await running.import_bdks()
    sealed = running.seal()
    reached, wraps = asyncio.Event(), 0

    async def hang_at_the_third() -> None:
        nonlocal wraps
        wraps += 1
        if wraps == 3:
            reached.set()
            await asyncio.Event().wait()

    hindered.before_wrap = hang_at_the_third
    moving = Node(database, Providers(hindered), recorded)
    cut = asyncio.ensure_future(moving.rewrapper.rewrap("uid:0"))
    await asyncio.wait_for(reached.wait(), 5)
    cut.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut
    assert [name for name, _ in recorded.rewraps()] == NAMES[:2]
    await (await node(database, recorded, local("b", "a"))).opens(sealed)
    with pytest.raises(ConfigError, match="does not open"):
        await node(database, recorded, local("b"))
    hindered.before_wrap = None
    report = await moving.rewrapper.rewrap("uid:0")
    expected = {name: "current" if name in NAMES[:2] else "rewrapped" for name in NAMES}
    assert outcomes(report.keys) == expected
    assert [name for name, _ in recorded.rewraps()] == NAMES
    await (await node(database, recorded, local("b"))).opens(sealed)
    again = await moving.rewrapper.rewrap("uid:0")
    assert again.count("current") == len(NAMES)
    assert len(recorded.rewraps()) == len(NAMES)


async def test_two_rewraps_at_once_leave_every_key_usable(
    database: Database, recorded: Recorded, local: Callable[..., LocalProvider]
) -> None:
    running = await node(database, recorded, local("a"))
    await running.import_bdks()
    sealed = running.seal()
    both = [Node(database, Providers(local("b", "a")), recorded) for _ in range(2)]
    reports = await asyncio.gather(*(one.rewrapper.rewrap("uid:0") for one in both))
    assert not any(report.count("failed") for report in reports)
    assert sorted(name for name, _ in recorded.rewraps()) == sorted(NAMES)
    await (await node(database, recorded, local("b"))).opens(sealed)


# ---- the whole way


@pytest.fixture
async def kms(moto_kms: MotoKms, aws_environment: None) -> AsyncIterator[AwsKmsProvider]:
    settings = KmsSettings(key_id=moto_kms.create_key(), region=REGION, endpoint_url=moto_kms.url)
    provider = AwsKmsProvider(settings)
    yield provider
    await provider.close()


@pytest.mark.debian
async def test_a_live_system_moves_from_local_to_kms_to_an_hsm_without_a_failed_read(
    database: Database,
    recorded: Recorded,
    local: Callable[..., LocalProvider],
    kms: AwsKmsProvider,
    hsm_provider: Pkcs11Provider,
) -> None:
    old = local("a")
    reader = await node(database, recorded, old, kms, hsm_provider)
    await reader.import_bdks()
    sealed = reader.seal()
    reads, stop = 0, asyncio.Event()

    async def read_on() -> None:
        nonlocal reads
        while not stop.is_set():
            await reader.opens(sealed)
            reads += 1

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(read_on())
        for current, former in ((kms, [old]), (hsm_provider, [kms, old])):
            mover = await node(database, recorded, current, *former)
            report = await mover.rewrapper.rewrap("uid:0")
            assert outcomes(report.keys) == dict.fromkeys(NAMES, "rewrapped")
            assert {provider for _, provider, _ in await wrapped_rows(database)} == {current.name}
            # A node that knows the new provider alone starts, and opens all that was sealed.
            await (await node(database, recorded, current)).opens(sealed)
            seen = reads
            while reads < seen + 2:
                await reader.opens(sealed)
        stop.set()
    rows = await wrapped_rows(database)
    assert {name for name, _, wrapped in rows if wrapped is None} == set(BDKS)

    back = await node(database, recorded, old, hsm_provider)
    report = await back.rewrapper.rewrap("uid:0")
    assert {k.key for k in report.keys if k.outcome == "stays"} == {"bdk:lane-aes", "bdk:lane-tdes"}
    assert all("cannot leave it" in (k.reason or "") for k in report.keys if k.outcome == "stays")
    await back.opens(sealed)
    states = await back.rewrapper.providers()
    assert [(s.name, s.current, s.keys, s.trouble) for s in states] == [
        ("local", True, 4, None),
        ("pkcs11", False, 2, None),
    ]


async def test_calls_and_errors_of_providers_are_measured(
    local: Callable[..., LocalProvider],
) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, {"provider": "local", **labels}) or 0.0

    calls, errors = "glamd_keys_provider_calls_seconds_count", "glamd_keys_provider_errors_total"
    before = value(calls, operation="unwrap"), value(errors, kind="CRYPTO_ERROR")
    with pytest.raises(CryptoError):
        await Providers(local("a")).current.unwrap(b"", context="audit:v1")
    after = value(calls, operation="unwrap"), value(errors, kind="CRYPTO_ERROR")
    assert after == (before[0] + 1, before[1] + 1)
