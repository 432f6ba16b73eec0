"""Key sets against a real PostgreSQL: imports that fail, and initial keys of those that do not."""

import asyncio
from dataclasses import replace
from pathlib import Path

import asyncpg
import psec
import pytest

from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT, Profile, key_check_value
from glamd.db import Database
from glamd.errors import (
    ConflictError,
    CryptoError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from glamd.keys.key_sets.ceremony import Component
from glamd.keys.key_sets.service import BdkSource, HsmKey, Keys, ProtectedKey
from glamd.keys.key_sets.store import KeySet
from glamd.keys.keyrings import Keyrings
from glamd.keys.providers import interface
from glamd.keys.providers.interface import Providers
from glamd.keys.providers.local import LocalProvider, create_kek_file
from tests.support.keys import Recorded, local_provider
from tests.support.settable_clock import SettableClock

TDES = Profile(scheme=TDES_DUKPT)
AES = Profile(scheme=AES_DUKPT, data_usage="both", padding="pkcs7", mac="required")
TDES_BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
AES_BDK = bytes.fromhex("FEDCBA9876543210F1F1F1F1F1F1F1F1")
TDES_KSN = bytes.fromhex("FFFF9876543210E00007")
CLOCK = SettableClock()


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each: much cheaper than one each."""
    connection = await asyncpg.connect(module_database_url)
    await connection.execute("DELETE FROM cde.encryption_keys; DELETE FROM cde.key_sets")
    await connection.close()
    return module_database_url


@pytest.fixture
def provider(tmp_path: Path) -> Providers:
    return local_provider(tmp_path)


async def load(database: Database, provider: Providers, first: str = "v1") -> Keyrings:
    return await Keyrings.load(database, provider, CLOCK, first)


# ---- key sets


class AwayProvider(LocalProvider):
    """A provider that answers only when the test lets it."""

    def __init__(self) -> None:
        self.answer = asyncio.Event()

    async def wrap(self, key: bytes, *, context: str) -> bytes:
        await self.answer.wait()
        return key + context.encode()

    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        await self.answer.wait()
        return wrapped


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def keys(database: Database, provider: Providers, recorded: Recorded) -> Keys:
    return Keys(
        database=database,
        glam=database,
        providers=provider,
        identity_key=bytes(32),
        record=recorded,
        clock=CLOCK,
        readers=frozenset({"generic", "idtech"}),
    )


async def import_magtek(keys: Keys, key_set: str = "magtek") -> KeySet:
    return await keys.import_bdk(key_set=key_set, profile=TDES, bdk=TDES_BDK, actor="uid:0")


REFUSED: list[tuple[str, Profile, bytes, int, str]] = [
    ("", TDES, TDES_BDK, 1024, "key_set"),
    ("a/b", TDES, TDES_BDK, 1024, "key_set"),
    ("a" * 65, TDES, TDES_BDK, 1024, "key_set"),
    ("a\n", TDES, TDES_BDK, 1024, "key_set"),
    ("a", TDES, TDES_BDK, 7, "counter_window"),
    ("a", TDES, TDES_BDK, 65_544, "counter_window"),
    ("a", TDES, TDES_BDK, 1001, "counter_window"),
    ("a", TDES, TDES_BDK[:15], 1024, "bdk"),
    ("a", TDES, TDES_BDK + TDES_BDK[:8], 1024, "bdk"),
    ("a", TDES, bytes(16), 1024, "bdk"),
    ("a", TDES, TDES_BDK[:8] * 2, 1024, "bdk"),
    ("a", TDES, bytes([TDES_BDK[0] ^ 1]) + TDES_BDK[1:8] + TDES_BDK[:8], 1024, "bdk"),
    ("a", AES, AES_BDK[:15], 1024, "bdk"),
    ("a", AES, AES_BDK + b"\x01", 1024, "bdk"),
    ("a", AES, bytes(32), 1024, "bdk"),
]


@pytest.mark.parametrize(("name", "profile", "bdk", "window", "field"), REFUSED)
async def test_a_key_that_is_weak_or_does_not_fit_is_refused_by_field_and_recorded(
    *, name: str, profile: Profile, bdk: bytes, window: int, field: str, tmp_path: Path
) -> None:
    recorded = Recorded()
    with pytest.raises(InputError) as raised:
        await unconnected(recorded, tmp_path).import_bdk(
            key_set=name, profile=profile, bdk=bdk, actor="uid:0", counter_window=window
        )
    assert [error.field for error in raised.value.fields] == [field]
    assert recorded.rows == [("bdk.import", name, "uid:0", "VALIDATION_ERROR")]
    assert bdk.hex() not in str(raised.value)


def unconnected(recorded: Recorded, directory: Path) -> Keys:
    """Keys that would fail otherwise if they asked the database."""
    database = Database.__new__(Database)
    provider = local_provider(directory)
    return Keys(
        database=database,
        glam=database,
        providers=provider,
        identity_key=bytes(32),
        record=recorded,
        clock=CLOCK,
    )


FIRST = bytes.fromhex("1C587F1CD8F5E3B92A4D6E0851AB91C7")
KBPK_PARTS = (bytes(range(1, 33)), bytes(range(101, 133)))
KBPK = bytes(one ^ other for one, other in zip(*KBPK_PARTS, strict=True))


def part(key: bytes, holder: str, scheme: str = TDES_DUKPT) -> Component:
    return Component(holder, key, key_check_value(key, scheme))


def parts() -> tuple[Component, ...]:
    second = bytes(one ^ other for one, other in zip(FIRST, TDES_BDK, strict=True))
    return (part(FIRST, "Ann"), part(second, "Ben"))


def kbpk_parts() -> tuple[Component, ...]:
    return (part(KBPK_PARTS[0], "Ann", AES_DUKPT), part(KBPK_PARTS[1], "Ben", AES_DUKPT))


def key_block(header: str = "D0000B0TX00E0000", key: bytes = TDES_BDK) -> str:
    return psec.tr31.wrap(KBPK, header, key)


def wrong_kcv(components: tuple[Component, ...]) -> tuple[Component, ...]:
    return (components[0], replace(components[1], kcv="000000"))


@pytest.mark.parametrize(
    ("source", "field", "rows"),
    [
        (wrong_kcv(parts()), "components.1.kcv", ["ok", "VALIDATION_ERROR"]),
        (parts()[:1], "components", ["ok"]),
        ((parts()[0], part(bytes(16), "Ben")), "components.1", ["ok", "VALIDATION_ERROR"]),
        (
            (parts()[0], replace(parts()[1], holder="ann")),
            "components.1.holder",
            ["ok", "VALIDATION_ERROR"],
        ),
        (
            ProtectedKey(key_block(), wrong_kcv(kbpk_parts())),
            "kbpk.1.kcv",
            ["ok", "VALIDATION_ERROR"],
        ),
        (
            ProtectedKey(key_block(), (kbpk_parts()[0], part(bytes(range(32)), "Ben", AES_DUKPT))),
            "kbpk",
            ["ok", "ok"],
        ),
        (
            ProtectedKey(key_block("D0000P0TX00E0000"), kbpk_parts()),
            "key_block.usage",
            [],
        ),
        (ProtectedKey(key_block("D0000B0TE00E0000"), kbpk_parts()), "key_block.mode_of_use", []),
        (ProtectedKey(key_block("D0000B0AX00E0000"), kbpk_parts()), "key_block.algorithm", []),
        (ProtectedKey(key_block(key=TDES_BDK + TDES_BDK[:8]), kbpk_parts()), "key_block", None),
        (ProtectedKey(key_block(key=TDES_BDK[:8] * 2), kbpk_parts()), "key_block", None),
        (ProtectedKey(key_block()[:-1], kbpk_parts()), "key_block", []),
        (ProtectedKey("", kbpk_parts()), "key_block", []),
        (HsmKey("bdk-1"), "hsm_label", []),
    ],
    ids=range(14),
)
async def test_a_ceremony_that_goes_wrong_is_recorded_person_by_person(
    *,
    source: BdkSource,
    field: str,
    rows: list[str] | None,
    tmp_path: Path,
) -> None:
    recorded = Recorded()
    with pytest.raises(InputError) as raised:
        await unconnected(recorded, tmp_path).import_bdk(
            key_set="lane", profile=TDES, bdk=source, actor="uid:0"
        )
    assert [error.field for error in raised.value.fields] == [field]
    assert recorded.rows[-1] == ("bdk.import", "lane", "uid:0", "VALIDATION_ERROR")
    action = "kbpk.component" if isinstance(source, ProtectedKey) else "bdk.component"
    told = recorded.rows[:-1]
    assert {row[0] for row in told} <= {action}
    assert [row[3] for row in told] == (["ok", "ok"] if rows is None else rows)
    said = f"{raised.value} {recorded.rows}".upper()
    for secret in (TDES_BDK, FIRST, KBPK, *KBPK_PARTS):
        assert secret.hex().upper() not in said


async def test_a_reader_that_nobody_knows_is_refused_with_those_that_are(
    keys: Keys, recorded: Recorded
) -> None:
    with pytest.raises(InputError, match="generic, idtech") as raised:
        await keys.import_bdk(
            key_set="lane", profile=TDES, bdk=TDES_BDK, actor="uid:0", reader="nobody"
        )
    assert [error.field for error in raised.value.fields] == ["reader"]
    made = await keys.import_bdk(
        key_set="lane", profile=TDES, bdk=TDES_BDK, actor="uid:0", reader="idtech"
    )
    assert made.reader == "idtech"
    assert (await keys.initial_key("lane", TDES_KSN)).reader == "idtech"


async def test_components_give_the_key_and_a_row_for_each_of_their_holders(
    keys: Keys, recorded: Recorded
) -> None:
    made = await keys.import_bdk(key_set="lane", profile=TDES, bdk=parts(), actor="uid:7")
    assert made.kcv == "08D7B4"
    kcvs = [one.kcv for one in parts()]
    assert recorded.rows == [
        ("bdk.component", f"bdk:lane#1 KCV {kcvs[0]}", "uid:7 for Ann", "ok"),
        ("bdk.component", f"bdk:lane#2 KCV {kcvs[1]}", "uid:7 for Ben", "ok"),
        ("bdk.import", "lane", "uid:7", "ok"),
    ]
    key = (await keys.initial_key("lane", TDES_KSN)).key
    assert key.hex().upper() == "6AC292FAA1315B4D858AB3A3D7D5933A"


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("version", ["B", "D"])
async def test_a_key_block_gives_the_key_that_its_maker_put_in(
    keys: Keys, recorded: Recorded, version: str
) -> None:
    kbpk, components = (
        (TDES_BDK[::-1], tuple(part(one, name) for one, name in tdes_kbpk_parts()))
        if version == "B"
        else (KBPK, kbpk_parts())
    )
    block = psec.tr31.wrap(kbpk, f"{version}0000B0TX00E0000", TDES_BDK)
    source = ProtectedKey(f"{block}\n", components)
    made = await keys.import_bdk(key_set="lane", profile=TDES, bdk=source, actor="uid:7")
    assert made.kcv == "08D7B4"
    assert [row[0] for row in recorded.rows] == ["kbpk.component"] * 2 + ["bdk.import"]
    key = (await keys.initial_key("lane", TDES_KSN)).key
    assert key.hex().upper() == "6AC292FAA1315B4D858AB3A3D7D5933A"


def tdes_kbpk_parts() -> tuple[tuple[bytes, str], ...]:
    second = bytes(one ^ other for one, other in zip(FIRST, TDES_BDK[::-1], strict=True))
    return ((FIRST, "Ann"), (second, "Ben"))


class Hsm(LocalProvider):
    """A provider with one key of its own."""

    async def bdk_kcv(self, hsm_label: str, *, scheme: str) -> str:
        assert (hsm_label, scheme) == ("bdk-1", TDES_DUKPT)
        return "08D7B4"


async def test_a_key_of_the_hsm_is_known_by_its_label_and_check_value(
    database: Database, tmp_path: Path, recorded: Recorded
) -> None:
    create_kek_file(tmp_path / "kek")
    keys = Keys(
        database=database,
        glam=database,
        providers=Providers(Hsm(tmp_path / "kek")),
        identity_key=bytes(32),
        record=recorded,
        clock=CLOCK,
    )
    made = await keys.import_bdk(key_set="lane", profile=TDES, bdk=HsmKey("bdk-1"), actor="uid:0")
    assert (made.hsm_label, made.kcv) == ("bdk-1", "08D7B4")
    assert await keys.key_set("lane") == made
    assert await database.fetchval("SELECT wrapped_bdk FROM cde.key_sets") is None


async def test_a_key_set_that_is_not_there_cannot_be_retired(
    keys: Keys, recorded: Recorded
) -> None:
    for name in ("nobody", "a/b", ""):
        with pytest.raises(NotFoundError):
            await keys.retire_bdk(name, actor="uid:0")
        assert recorded.rows[-1] == ("bdk.retire", name, "uid:0", "KEY_SET_UNKNOWN")


async def test_a_retirement_that_cannot_be_recorded_is_none(keys: Keys, recorded: Recorded) -> None:
    await import_magtek(keys)
    recorded.error = UnavailableError("The audit is away.")
    with pytest.raises(UnavailableError):
        await keys.retire_bdk("magtek", actor="uid:0")
    assert (await keys.key_set("magtek")).status == "active"


async def test_a_retired_key_set_gives_no_key_any_more_and_its_name_stays_taken(
    keys: Keys, recorded: Recorded
) -> None:
    await import_magtek(keys)
    retired = await keys.retire_bdk("magtek", actor="uid:7")
    assert retired.status == "retired"
    assert retired.retired_at is not None
    with pytest.raises(NotFoundError) as raised:
        await keys.initial_key("magtek", TDES_KSN)
    assert raised.value.code == "KEY_SET_UNKNOWN"
    assert await keys.retire_bdk("magtek", actor="uid:8") == retired
    with pytest.raises(ConflictError):
        await import_magtek(keys)
    assert [row[1:] for row in recorded.rows if row[0] == "bdk.retire"] == [
        ("magtek", "uid:7", "ok"),
        ("magtek", "uid:8", "ok"),
    ]


async def test_a_name_that_is_taken_is_a_conflict_and_the_first_key_stays(
    keys: Keys, recorded: Recorded
) -> None:
    await import_magtek(keys)
    with pytest.raises(ConflictError) as raised:
        await keys.import_bdk(key_set="magtek", profile=AES, bdk=AES_BDK, actor="uid:7")
    assert raised.value.code == "KEY_SET_EXISTS"
    assert (await keys.key_set("magtek")).kcv == "08D7B4"
    assert recorded.rows == [
        ("bdk.import", "magtek", "uid:0", "ok"),
        ("bdk.import", "magtek", "uid:7", "KEY_SET_EXISTS"),
    ]


async def test_of_two_imports_of_one_name_at_once_one_wins(keys: Keys) -> None:
    results = await asyncio.gather(*(import_magtek(keys) for _ in range(3)), return_exceptions=True)
    assert sum(isinstance(result, KeySet) for result in results) == 1
    assert sum(isinstance(result, ConflictError) for result in results) == 2


async def test_a_key_whose_import_cannot_be_recorded_is_not_imported(
    keys: Keys, recorded: Recorded
) -> None:
    recorded.error = UnavailableError("The audit is away.")
    with pytest.raises(UnavailableError):
        await import_magtek(keys)
    assert await keys.list_key_sets() == ()
    with pytest.raises(UnavailableError):
        await keys.import_bdk(key_set="magtek", profile=TDES, bdk=parts(), actor="uid:0")
    recorded.error = None
    await import_magtek(keys)


async def test_an_unknown_key_set_is_not_found(keys: Keys) -> None:
    for name in ("nobody", "", "a/b", "\0"):
        with pytest.raises(NotFoundError) as raised:
            await keys.initial_key(name, TDES_KSN)
        assert raised.value.code == "KEY_SET_UNKNOWN"
        with pytest.raises(NotFoundError):
            await keys.key_set(name)


async def test_a_ksn_of_the_other_scheme_is_refused(keys: Keys) -> None:
    await import_magtek(keys)
    with pytest.raises(InputError) as raised:
        await keys.initial_key("magtek", bytes(12))
    assert [error.field for error in raised.value.fields] == ["ksn"]


async def test_a_provider_that_does_not_answer_is_waited_for_no_longer_than_its_limit(
    database: Database, keys: Keys, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    await import_magtek(keys)
    away = Keys(
        database=database,
        glam=database,
        providers=Providers(AwayProvider()),
        identity_key=bytes(32),
        record=recorded,
        clock=CLOCK,
    )
    monkeypatch.setattr(interface, "TIMEOUT_S", 0.01)
    with pytest.raises(UnavailableError, match="does not answer in time"):
        await away.initial_key("magtek", TDES_KSN)
    with pytest.raises(UnavailableError):
        await import_magtek(away, "other")
    assert recorded.rows[-1] == ("bdk.import", "other", "uid:0", "UNAVAILABLE")


async def test_a_bdk_that_was_put_under_another_name_does_not_open(
    database: Database, keys: Keys
) -> None:
    await import_magtek(keys, "one")
    await import_magtek(keys, "two")
    await database.execute(
        "UPDATE cde.key_sets t SET wrapped_bdk = o.wrapped_bdk FROM cde.key_sets o "
        "WHERE o.key_set = 'one' AND t.key_set = 'two'"
    )
    with pytest.raises(CryptoError, match="bdk:two does not open"):
        await keys.initial_key("two", TDES_KSN)


async def test_an_imported_key_gives_its_published_initial_key(
    keys: Keys, recorded: Recorded
) -> None:
    made = await import_magtek(keys)
    assert made.kcv == "08D7B4"
    profile, _, initial_key = await keys.initial_key("magtek", TDES_KSN)
    assert profile == TDES
    assert initial_key.hex().upper() == "6AC292FAA1315B4D858AB3A3D7D5933A"
    assert recorded.rows == [("bdk.import", "magtek", "uid:0", "ok")]


async def test_a_key_set_comes_back_as_it_was_imported_and_its_key_stays_wrapped(
    database: Database, keys: Keys
) -> None:
    made = await keys.import_bdk(
        key_set="aes-1", profile=AES, bdk=AES_BDK, actor="uid:0", counter_window=64
    )
    await import_magtek(keys)
    assert await keys.key_set("aes-1") == made
    listed = [(one.key_set.key_set, one.devices) for one in await keys.list_key_sets()]
    assert listed == [("aes-1", 0), ("magtek", 0)]
    assert (made.counter_window, made.provider, made.status) == (64, "local", "active")
    wrapped = await database.fetchval("SELECT string_agg(wrapped_bdk, '') FROM cde.key_sets")
    assert isinstance(wrapped, bytes)
    assert AES_BDK not in wrapped
    assert TDES_BDK not in wrapped


async def test_keys_are_listed_with_their_check_values(
    database: Database, provider: Providers, keys: Keys
) -> None:
    loaded = await load(database, provider)
    listed = await keys.list_keys()
    assert {(one.keyring, one.version, one.status, one.kcv) for one in listed} == {
        (ring.name, "v1", "active", ring.active.kcv) for ring in loaded.all()
    }
