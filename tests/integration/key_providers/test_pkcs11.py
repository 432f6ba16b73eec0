"""The key provider `pkcs11` on a real SoftHSM2: refusals, a token that goes away, the vectors."""

import asyncio
import json
import stat
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, ObjectClass, Session

from glamd.crypto import dukpt, kcv
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT
from glamd.errors import ConfigError, CryptoError, InputError, UnavailableError
from glamd.keys.providers import hsm
from glamd.keys.providers.interface import KeptBdk
from glamd.keys.providers.one_thread import PKCS11, OneThread
from glamd.keys.providers.pkcs11 import RIGHT_HALF_SUFFIX, Pkcs11Provider
from tests.support.softhsm import SoftHsm

pytestmark = pytest.mark.debian

KEY = bytes(range(32))
NAME = "payment-tokens:v1"
VECTORS: Final = json.loads(
    (Path(__file__).parents[2] / "vectors" / "vectors_public.json").read_text()
)["sets"]
TDES_BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
TDES_KSN = bytes.fromhex("FFFF9876543210E00007")
C0 = int.from_bytes(bytes.fromhex("C0C0C0C000000000") * 2, "big")


async def inside(provider: Pkcs11Provider, work: object) -> object:
    """Run something in the provider's own session, on its thread."""
    assert callable(work)
    return await PKCS11.run(lambda: provider._hsm.run(work))


def put(label: str, value: bytes, key_type: KeyType, **attributes: bool) -> object:
    template: dict[Attribute, object] = {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: key_type,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.ENCRYPT: True,
        Attribute.LABEL: label,
        Attribute.VALUE: value,
        **{Attribute[name.upper()]: wanted for name, wanted in attributes.items()},
    }

    def work(session: Session) -> None:
        if hsm.find(session, label) is None:
            session.create_object(template)

    return work


# ---- what is refused before the token is asked


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o777])
def test_a_pin_file_with_another_mode_is_refused_with_its_remedy(
    softhsm: SoftHsm, tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "pin"
    path.write_text("1234")
    path.chmod(mode)
    address = replace(softhsm.address, pin_file=path)
    with pytest.raises(ConfigError, match=f"chmod 0600 {path}") as raised:
        Pkcs11Provider(address, kek_label="glamd-kek")
    assert [error.field for error in raised.value.fields] == ["keys.pkcs11_pin_file"]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_a_pin_file_without_a_pin_is_refused(
    softhsm: SoftHsm, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "pin"
    path.write_bytes(content)
    path.chmod(stat.S_IRUSR)
    with pytest.raises(ConfigError, match="The HSM's PIN"):
        Pkcs11Provider(replace(softhsm.address, pin_file=path), kek_label="glamd-kek")


def test_a_module_that_is_not_there_is_named(softhsm: SoftHsm, tmp_path: Path) -> None:
    address = replace(softhsm.address, module=tmp_path / "none.so")
    with pytest.raises(ConfigError, match=r"keys\.pkcs11_module"):
        Pkcs11Provider(address, kek_label="glamd-kek")


@pytest.mark.parametrize("label", ["", "x" * 65])
def test_a_kek_label_that_cannot_be_is_refused(softhsm: SoftHsm, label: str) -> None:
    with pytest.raises(ConfigError, match=r"keys\.pkcs11_kek_label"):
        Pkcs11Provider(softhsm.address, kek_label=label)


# ---- what the token refuses


async def test_a_missing_kek_is_answered_with_the_command_that_makes_it(softhsm: SoftHsm) -> None:
    provider = Pkcs11Provider(softhsm.address, kek_label="not-made")
    with pytest.raises(CryptoError, match=r"pkcs11-tool --module .* --label not-made") as raised:
        await provider.health()
    assert [error.field for error in raised.value.fields] == ["keys.pkcs11_kek_label"]


@pytest.mark.parametrize(
    ("label", "value", "attributes", "reason"),
    [
        ("kek-16", bytes(range(16)), {}, "no AES key of 32 bytes"),
        ("kek-out", KEY, {"extractable": True}, "CKA_EXTRACTABLE"),
        ("kek-seen", KEY, {"sensitive": False}, "CKA_SENSITIVE"),
        ("kek-public", KEY, {"private": False}, "CKA_PRIVATE"),
        ("kek-idle", KEY, {"encrypt": False}, "CKA_ENCRYPT"),
    ],
)
async def test_a_kek_that_does_not_keep_its_secret_is_refused(
    hsm_provider: Pkcs11Provider,
    softhsm: SoftHsm,
    label: str,
    value: bytes,
    attributes: dict[str, bool],
    reason: str,
) -> None:
    await inside(hsm_provider, put(label, value, KeyType.AES, **attributes))
    with pytest.raises(CryptoError, match=reason):
        await Pkcs11Provider(softhsm.address, kek_label=label).wrap(KEY, context=NAME)


async def test_a_refused_pin_is_not_tried_again_lest_the_token_locks_itself(
    softhsm: SoftHsm, tmp_path: Path
) -> None:
    path = tmp_path / "pin"
    path.write_text("99999999")
    path.chmod(0o600)
    # A login is the process's: without another session there is none that would serve this one.
    await softhsm.cut_sessions()
    provider = Pkcs11Provider(replace(softhsm.address, pin_file=path), kek_label="glamd-kek")
    with pytest.raises(CryptoError, match=r"refuses the PIN \(PinIncorrect\)") as raised:
        await provider.health()
    assert "99999999" not in str(raised.value)
    path.write_text(softhsm.pin_file.read_text())
    with pytest.raises(CryptoError, match="refuses the PIN"):
        await provider.health()


async def test_another_name_or_a_changed_byte_does_not_open(hsm_provider: Pkcs11Provider) -> None:
    wrapped = await hsm_provider.wrap(KEY, context=NAME)
    with pytest.raises(CryptoError, match="audit:v1 does not open under the HSM's"):
        await hsm_provider.unwrap(wrapped, context="audit:v1")
    for position in range(len(wrapped)):
        damaged = bytearray(wrapped)
        damaged[position] ^= 1
        with pytest.raises(CryptoError):
            await hsm_provider.unwrap(bytes(damaged), context=NAME)
    assert await hsm_provider.unwrap(wrapped, context=NAME) == KEY


@pytest.mark.parametrize("wrapped", [b"", b"\x03", b"\x03\x05ab", b"\x01" + bytes(60), b"\x03\xff"])
async def test_what_is_no_wrapped_key_of_this_provider_is_refused(
    hsm_provider: Pkcs11Provider, wrapped: bytes
) -> None:
    with pytest.raises(CryptoError, match="not in a form of provider pkcs11"):
        await hsm_provider.unwrap(wrapped, context=NAME)


async def test_a_new_kek_still_opens_what_the_one_before_wrapped(
    hsm_provider: Pkcs11Provider, softhsm: SoftHsm
) -> None:
    wrapped = await hsm_provider.wrap(KEY, context=NAME)
    newer = Pkcs11Provider(softhsm.address, kek_label="glamd-kek-2")
    await newer.create_kek()
    assert await newer.unwrap(wrapped, context=NAME) == KEY
    assert not await newer.is_current(wrapped, context=NAME)
    again = await newer.wrap(KEY, context=NAME)
    assert await newer.is_current(again, context=NAME)
    await newer.close()


# ---- a token that goes away


async def test_sessions_that_were_cut_are_opened_again(
    hsm_provider: Pkcs11Provider, softhsm: SoftHsm
) -> None:
    wrapped = await hsm_provider.wrap(KEY, context=NAME)
    await softhsm.cut_sessions()
    assert await hsm_provider.unwrap(wrapped, context=NAME) == KEY


async def test_a_module_that_was_ended_is_begun_again(
    hsm_provider: Pkcs11Provider, softhsm: SoftHsm
) -> None:
    wrapped = await hsm_provider.wrap(KEY, context=NAME)
    await softhsm.finalize()
    assert await hsm_provider.unwrap(wrapped, context=NAME) == KEY


async def test_a_token_that_is_away_is_unavailable_and_comes_back_by_itself(
    hsm_provider: Pkcs11Provider, softhsm: SoftHsm
) -> None:
    wrapped = await hsm_provider.wrap(KEY, context=NAME)
    kept = await hsm_provider.keep_bdk(TDES_BDK, scheme=TDES_DUKPT, context="bdk:away")
    calls = {
        "unwrap": lambda: hsm_provider.unwrap(wrapped, context=NAME),
        "wrap": lambda: hsm_provider.wrap(KEY, context=NAME),
        "derive": lambda: hsm_provider.initial_key(
            kept, scheme=TDES_DUKPT, ksn=TDES_KSN, context="bdk:away"
        ),
        "health": hsm_provider.health,
    }
    with softhsm.away():
        for _ in range(2):
            for call in calls.values():
                with pytest.raises(UnavailableError, match="token glamd-tests cannot be used now"):
                    await call()
    for call in calls.values():
        await call()


async def test_a_pin_file_that_goes_is_unavailable_until_it_is_there_again(
    softhsm: SoftHsm, tmp_path: Path, hsm_provider: Pkcs11Provider
) -> None:
    path = tmp_path / "pin"
    path.write_text(softhsm.pin_file.read_text())
    path.chmod(0o600)
    provider = Pkcs11Provider(replace(softhsm.address, pin_file=path), kek_label="glamd-kek")
    await provider.health()
    path.rename(tmp_path / "elsewhere")
    await softhsm.cut_sessions()
    with pytest.raises(UnavailableError, match="The HSM's PIN"):
        await provider.health()
    (tmp_path / "elsewhere").rename(path)
    await provider.health()
    await provider.close()


async def test_too_many_calls_at_once_are_refused_and_a_cancelled_one_is_left_out() -> None:
    thread = OneThread(name="test", waiting_limit=2)
    entered, leave = threading.Event(), threading.Event()
    done: list[int] = []

    def block() -> None:
        entered.set()
        leave.wait(10)

    def note(number: int) -> None:
        done.append(number)

    blocked = asyncio.ensure_future(thread.run(block))
    await asyncio.to_thread(entered.wait, 10)
    waiting = [asyncio.ensure_future(thread.run(partial(note, n))) for n in (1, 2)]
    await asyncio.wait(waiting, timeout=0)
    with pytest.raises(UnavailableError, match="too many calls"):
        await thread.run(partial(note, 3))
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    leave.set()
    await asyncio.gather(blocked, waiting[1])
    assert done == [2]


async def test_many_at_once_are_all_served(hsm_provider: Pkcs11Provider) -> None:
    names = [f"payment-tokens:v{number}" for number in range(40)]
    wrapped = await asyncio.gather(*(hsm_provider.wrap(KEY, context=name) for name in names))
    opened = await asyncio.gather(
        *(hsm_provider.unwrap(key, context=n) for key, n in zip(wrapped, names, strict=True))
    )
    assert opened == [KEY] * len(names)


# ---- base derivation keys


def initial_keys() -> list[tuple[str, str, str, str]]:
    """Scheme, BDK, KSN and initial key of every published set that has them."""
    found = []
    for entry in VECTORS:
        scheme = TDES_DUKPT if entry["kind"].startswith("tdes") else AES_DUKPT
        ksn, key = entry.get("iksn") or entry.get("ikid"), entry.get("ik")
        if entry.get("bdk") and ksn and key:
            full = ksn if scheme == TDES_DUKPT else ksn.ljust(24, "0")
            found.append((scheme, entry["bdk"], full, key))
    return sorted(set(found))


@pytest.mark.parametrize(("scheme", "bdk", "ksn", "expected"), initial_keys())
async def test_the_hsm_derives_the_published_initial_keys(
    hsm_provider: Pkcs11Provider, scheme: str, bdk: str, ksn: str, expected: str
) -> None:
    clear, context = bytes.fromhex(bdk), "bdk:published"
    kept = await hsm_provider.keep_bdk(clear, scheme=scheme, context=context)
    found = await hsm_provider.initial_key(
        kept, scheme=scheme, ksn=bytes.fromhex(ksn), context=context
    )
    assert found.hex().upper() == expected.upper()
    assert kept.hsm_label is not None
    check = (kcv.tdes if scheme == TDES_DUKPT else kcv.aes)(clear).hex().upper()
    assert await hsm_provider.bdk_kcv(kept.hsm_label, scheme=scheme) == check


def test_the_published_initial_keys_are_of_both_schemes() -> None:
    lengths = {(scheme, len(bdk) // 2) for scheme, bdk, _, _ in initial_keys()}
    assert lengths == {(TDES_DUKPT, 16), (AES_DUKPT, 16), (AES_DUKPT, 32)}


@pytest.mark.parametrize("length_bytes", [16, 24, 32])
async def test_of_every_length_the_hsm_derives_what_this_process_would(
    hsm_provider: Pkcs11Provider, length_bytes: int
) -> None:
    bdk, ksn = bytes(range(length_bytes)), bytes.fromhex("1234567890123456000000FF")
    kept = await hsm_provider.keep_bdk(bdk, scheme=AES_DUKPT, context="bdk:lengths")
    found = await hsm_provider.initial_key(kept, scheme=AES_DUKPT, ksn=ksn, context="bdk:lengths")
    assert found == dukpt.initial_key(AES_DUKPT, bdk, ksn)
    assert kept.hsm_label is not None
    check = await hsm_provider.bdk_kcv(kept.hsm_label, scheme=AES_DUKPT)
    assert check == kcv.aes(bdk).hex().upper()


@pytest.mark.parametrize("scheme", [TDES_DUKPT, AES_DUKPT])
async def test_a_bdk_in_the_hsm_cannot_be_read_nor_made_readable(
    hsm_provider: Pkcs11Provider, scheme: str
) -> None:
    kept = await hsm_provider.keep_bdk(TDES_BDK, scheme=scheme, context="bdk:secret")
    assert kept.wrapped is None
    assert kept.hsm_label is not None
    labels = [kept.hsm_label]
    if scheme == TDES_DUKPT:
        labels.append(kept.hsm_label + RIGHT_HALF_SUFFIX)
    for label in labels:

        def work(session: Session, label: str = label) -> None:
            key = hsm.find(session, label)
            assert key is not None
            with pytest.raises(pkcs11.AttributeSensitive):
                key[Attribute.VALUE]
            with pytest.raises(pkcs11.PKCS11Error):
                key[Attribute.EXTRACTABLE] = True
            with pytest.raises(pkcs11.PKCS11Error):
                key[Attribute.SENSITIVE] = False
            with pytest.raises(pkcs11.PKCS11Error):
                key.copy({Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True})

        await inside(hsm_provider, work)


async def test_keeping_a_bdk_twice_makes_no_second_object(hsm_provider: Pkcs11Provider) -> None:
    first = await hsm_provider.keep_bdk(TDES_BDK, scheme=TDES_DUKPT, context="bdk:twice")
    assert await hsm_provider.keep_bdk(TDES_BDK, scheme=TDES_DUKPT, context="bdk:twice") == first

    def work(session: Session) -> int:
        return len(list(session.get_objects({Attribute.LABEL: first.hsm_label})))

    assert await inside(hsm_provider, work) == 1


async def test_an_object_of_that_label_that_is_another_key_is_not_taken_for_it(
    hsm_provider: Pkcs11Provider,
) -> None:
    check = kcv.tdes(TDES_BDK).hex().upper()
    label = f"glamd-bdk-forged-{check}"
    await inside(hsm_provider, put(label, bytes.fromhex("02" * 8 + "04" * 8), KeyType.DES2))
    with pytest.raises(CryptoError, match="it is not this key"):
        await hsm_provider.keep_bdk(TDES_BDK, scheme=TDES_DUKPT, context="bdk:forged")


async def test_a_label_without_its_second_object_is_told_its_name(
    hsm_provider: Pkcs11Provider,
) -> None:
    await inside(hsm_provider, put("lane-tdes", TDES_BDK, KeyType.DES2))
    with pytest.raises(InputError, match="no object lane-tdes-c0: the BDK XOR C0C0C0C0") as raised:
        await hsm_provider.bdk_kcv("lane-tdes", scheme=TDES_DUKPT)
    assert [error.field for error in raised.value.fields] == ["hsm_label"]
    right = (int.from_bytes(TDES_BDK, "big") ^ C0).to_bytes(16, "big")
    await inside(hsm_provider, put("lane-tdes-c0", right, KeyType.DES2))
    assert await hsm_provider.bdk_kcv("lane-tdes", scheme=TDES_DUKPT) == "08D7B4"
    derived = await hsm_provider.initial_key(
        KeptBdk(hsm_label="lane-tdes"), scheme=TDES_DUKPT, ksn=TDES_KSN, context="bdk:lane"
    )
    assert derived == dukpt.initial_key(TDES_DUKPT, TDES_BDK, TDES_KSN)


@pytest.mark.parametrize(
    ("label", "key_type", "attributes", "scheme", "reason"),
    [
        ("no-such", None, {}, AES_DUKPT, "no secret key no-such"),
        ("out-aes", KeyType.AES, {"extractable": True}, AES_DUKPT, "CKA_EXTRACTABLE"),
        ("seen-aes", KeyType.AES, {"sensitive": False}, AES_DUKPT, "CKA_SENSITIVE"),
        ("idle-aes", KeyType.AES, {"encrypt": False}, AES_DUKPT, "CKA_ENCRYPT"),
        ("kind-aes", KeyType.AES, {}, TDES_DUKPT, "of another kind than tdes-dukpt"),
        ("kind-des", KeyType.DES2, {}, AES_DUKPT, "of another kind than aes-dukpt"),
    ],
)
async def test_an_object_that_is_not_fit_for_a_bdk_is_refused(
    hsm_provider: Pkcs11Provider,
    label: str,
    key_type: KeyType | None,
    attributes: dict[str, bool],
    scheme: str,
    reason: str,
) -> None:
    if key_type is not None:
        await inside(hsm_provider, put(label, TDES_BDK, key_type, **attributes))
    with pytest.raises(InputError, match=reason) as raised:
        await hsm_provider.bdk_kcv(label, scheme=scheme)
    assert [error.field for error in raised.value.fields] == ["hsm_label"]


async def test_a_bdk_whose_object_was_removed_is_named(hsm_provider: Pkcs11Provider) -> None:
    with pytest.raises(CryptoError, match="no object gone, which is the key bdk:lane"):
        await hsm_provider.initial_key(
            KeptBdk(hsm_label="gone"), scheme=TDES_DUKPT, ksn=TDES_KSN, context="bdk:lane"
        )
    with pytest.raises(CryptoError, match="wrapped, not an object"):
        await hsm_provider.initial_key(
            KeptBdk(wrapped=b"x"), scheme=TDES_DUKPT, ksn=TDES_KSN, context="bdk:lane"
        )
    with pytest.raises(InputError):
        await hsm_provider.initial_key(
            KeptBdk(hsm_label="gone"), scheme=TDES_DUKPT, ksn=b"", context="bdk:lane"
        )
