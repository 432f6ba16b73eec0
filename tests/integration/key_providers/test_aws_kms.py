"""The key provider `aws-kms`: what moto's KMS answers over HTTP, what a scripted one refuses."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator

import aioboto3
import pytest

from glamd.crypto import dukpt
from glamd.crypto.dukpt import TDES_DUKPT
from glamd.errors import ConfigError, CryptoError, InputError, UnavailableError
from glamd.keys.providers import aws_kms
from glamd.keys.providers.aws_kms import CONTEXT_NAME, AwsKmsProvider, KmsSettings
from glamd.keys.providers.interface import Providers
from tests.support.kms import REGION, SECRET, MotoKms, ScriptedKms

pytestmark = pytest.mark.usefixtures("aws_environment")

KEY = bytes(range(32))
sdk_session = aioboto3.Session
NAME = "payment-tokens:v1"
KEY_ID = "alias/glamd"
TDES_BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
TDES_KSN = bytes.fromhex("FFFF9876543210E00007")


def at(
    url: str,
    key_id: str = KEY_ID,
    *,
    bdk_key_id: str | None = None,
    former_key_ids: tuple[str, ...] = (),
    region: str | None = REGION,
) -> AwsKmsProvider:
    settings = KmsSettings(
        key_id=key_id,
        bdk_key_id=bdk_key_id,
        former_key_ids=former_key_ids,
        region=region,
        endpoint_url=url,
    )
    return AwsKmsProvider(settings)


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedKms]:
    async with ScriptedKms().running() as server:
        yield server


@pytest.fixture
async def refused(scripted: ScriptedKms) -> AsyncIterator[AwsKmsProvider]:
    """A provider whose KMS answers as the script says."""
    provider = at(scripted.url)
    yield provider
    await provider.close()


# ---- a KMS that refuses, is slow or away


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDeniedException", "allow it to glamd's AWS identity"),
        ("NotFoundException", "no such key in this region"),
        ("DisabledException", "the key is disabled; enable it"),
        ("KMSInvalidStateException", "deletion is pending"),
        ("InvalidKeyUsageException", "symmetric"),
        ("UnrecognizedClientException", "does not accept glamd's credentials"),
        ("SomethingNewException", "AWS's reference"),
    ],
)
async def test_a_refusal_names_the_key_and_what_to_do_and_nothing_of_awss_own_text(
    scripted: ScriptedKms, refused: AwsKmsProvider, code: str, remedy: str
) -> None:
    scripted.refuse(code)
    for call in (
        refused.wrap(KEY, context=NAME),
        refused.unwrap(b"\x02blob", context=NAME),
        refused.health(),
    ):
        with pytest.raises(CryptoError, match=remedy) as raised:
            await call
        assert f"with the key {KEY_ID} ({code})" in raised.value.message
        assert "111122223333" not in raised.value.message
        assert SECRET not in raised.value.message
    assert len(scripted.requests) == 3, "what is refused is not tried again"


@pytest.mark.parametrize("code", ["IncorrectKeyException", "InvalidCiphertextException"])
async def test_what_another_key_wrapped_is_not_opened(
    scripted: ScriptedKms, refused: AwsKmsProvider, code: str
) -> None:
    scripted.refuse(code)
    with pytest.raises(CryptoError, match=f"payment-tokens:v1 does not open under .* {KEY_ID}"):
        await refused.unwrap(b"\x02blob", context=NAME)
    assert not await refused.is_current(b"\x02blob", context=NAME)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("ThrottlingException", 400),
        ("KeyUnavailableException", 500),
        ("KMSInternalException", 500),
        ("ServiceUnavailable", 503),
        ("", 502),
    ],
)
async def test_what_may_pass_is_tried_twice_and_then_unavailable(
    scripted: ScriptedKms, refused: AwsKmsProvider, code: str, status: int
) -> None:
    scripted.refuse(code, status=status)
    with pytest.raises(UnavailableError, match="does not serve Decrypt now") as raised:
        await refused.unwrap(b"\x02blob", context=NAME)
    assert SECRET not in raised.value.message
    assert len(scripted.requests) == aws_kms.ATTEMPTS


async def test_a_kms_that_does_not_answer_is_unavailable_in_time(
    scripted: ScriptedKms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_kms, "READ_TIMEOUT_S", 0.05)
    scripted.silent = True
    provider = at(scripted.url)
    with pytest.raises(UnavailableError, match="cannot be asked for Decrypt: no answer"):
        await provider.unwrap(b"\x02blob", context=NAME)
    assert len(scripted.requests) == aws_kms.ATTEMPTS
    await provider.close()


def test_two_attempts_fit_into_what_a_provider_may_take() -> None:
    whole = aws_kms.ATTEMPTS * (aws_kms.CONNECT_TIMEOUT_S + aws_kms.READ_TIMEOUT_S)
    assert whole < 5.0


async def test_a_call_that_is_cancelled_leaves_the_client_usable(
    scripted: ScriptedKms, refused: AwsKmsProvider
) -> None:
    scripted.silent = True
    call = asyncio.ensure_future(refused.unwrap(b"\x02blob", context=NAME))
    await asyncio.wait_for(scripted.asked.wait(), 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    scripted.silent = False
    scripted.refuse("DisabledException")
    with pytest.raises(CryptoError, match="enable it"):
        await refused.unwrap(b"\x02blob", context=NAME)


async def test_nobody_listening_is_unavailable_and_comes_back_by_itself() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        provider = at(f"http://127.0.0.1:{port}")
        with pytest.raises(UnavailableError, match="no answer"):
            await provider.health()
    async with ScriptedKms(body={"KeyMetadata": {"KeyId": KEY_ID, "Enabled": True}}).running(port):
        await provider.health()
    await provider.close()


async def test_without_credentials_it_is_unavailable_and_says_so(
    scripted: ScriptedKms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioboto3, "Session", sdk_session)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    provider = at(scripted.url)
    with pytest.raises(UnavailableError, match="no credentials are found"):
        await provider.health()
    await provider.close()


async def test_without_a_region_the_setting_is_named(
    scripted: ScriptedKms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioboto3, "Session", sdk_session)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    provider = at(scripted.url, region=None)
    with pytest.raises(ConfigError, match=r"set keys\.kms_region") as raised:
        await provider.health()
    assert [error.field for error in raised.value.fields] == ["keys.kms_region"]


async def test_the_whole_of_providers_turns_a_refusal_at_readiness_into_unavailable(
    scripted: ScriptedKms, refused: AwsKmsProvider
) -> None:
    scripted.refuse("DisabledException")
    with pytest.raises(UnavailableError, match="enable it"):
        await Providers(refused).health()


@pytest.mark.parametrize("wrapped", [b"", b"\x01blob", b"blob"])
async def test_what_is_no_wrapped_key_of_this_provider_is_refused_unasked(
    scripted: ScriptedKms, refused: AwsKmsProvider, wrapped: bytes
) -> None:
    with pytest.raises(CryptoError, match="not in a form of provider aws-kms"):
        await refused.unwrap(wrapped, context=NAME)
    assert not scripted.requests


async def test_no_key_gets_into_a_debug_log(
    moto_kms: MotoKms, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    provider = at(moto_kms.url, moto_kms.create_key())
    wrapped = await provider.wrap(b"plain-key-plain-key-plain-key-xx", context=NAME)
    await provider.unwrap(wrapped, context=NAME)
    await provider.close()
    assert "botocore" not in {name.split(".")[0] for name, _, _ in caplog.record_tuples}
    assert "cGxhaW4ta2V5" not in caplog.text
    assert "plain-key" not in caplog.text


# ---- moto's KMS


async def test_a_key_is_bound_to_its_name_and_to_its_kms_key(moto_kms: MotoKms) -> None:
    one, other = moto_kms.create_key(), moto_kms.create_key()
    provider, stranger = at(moto_kms.url, one), at(moto_kms.url, other)
    wrapped = await provider.wrap(KEY, context=NAME)
    with pytest.raises(CryptoError, match="audit:v1 does not open"):
        await provider.unwrap(wrapped, context="audit:v1")
    with pytest.raises(CryptoError):
        await stranger.unwrap(wrapped, context=NAME)
    for position in (0, 1, len(wrapped) - 1):
        damaged = bytearray(wrapped)
        damaged[position] ^= 1
        with pytest.raises(CryptoError):
            await provider.unwrap(bytes(damaged), context=NAME)
    assert await provider.unwrap(wrapped, context=NAME) == KEY
    assert KEY not in wrapped
    await provider.close()
    await stranger.close()


async def test_a_former_kms_key_opens_and_no_longer_wraps(moto_kms: MotoKms) -> None:
    one, other = moto_kms.create_key(), moto_kms.create_key()
    before = at(moto_kms.url, one)
    wrapped = await before.wrap(KEY, context=NAME)
    now = at(moto_kms.url, other, former_key_ids=(one,))
    assert await now.unwrap(wrapped, context=NAME) == KEY
    assert not await now.is_current(wrapped, context=NAME)
    again = await now.wrap(KEY, context=NAME)
    assert await now.is_current(again, context=NAME)
    with pytest.raises(CryptoError):
        await before.unwrap(again, context=NAME)
    await before.close()
    await now.close()


async def test_a_bdk_has_a_kms_key_of_its_own_where_one_is_named(moto_kms: MotoKms) -> None:
    kek, bdk_kek = moto_kms.create_key(), moto_kms.create_key()
    plain = at(moto_kms.url, kek)
    earlier = await plain.keep_bdk(TDES_BDK, scheme=TDES_DUKPT, context="bdk:lane-1")
    provider = at(moto_kms.url, kek, bdk_key_id=bdk_kek)
    kept = await provider.keep_bdk(TDES_BDK, scheme=TDES_DUKPT, context="bdk:lane-1")
    assert kept.wrapped is not None
    assert bdk_kek.encode() in kept.wrapped, "moto's blobs name their key"
    for bdk in (kept, earlier):
        key = await provider.initial_key(bdk, scheme=TDES_DUKPT, ksn=TDES_KSN, context="bdk:lane-1")
        assert key == dukpt.initial_key(TDES_DUKPT, TDES_BDK, TDES_KSN)
    assert earlier.wrapped is not None
    assert not await provider.is_current(earlier.wrapped, context="bdk:lane-1")
    with pytest.raises(InputError, match="this is for pkcs11"):
        await provider.bdk_kcv("label", scheme=TDES_DUKPT)
    await plain.close()
    await provider.close()


async def test_health_finds_a_key_that_is_disabled_or_is_none(moto_kms: MotoKms) -> None:
    key_id = moto_kms.create_key()
    provider = at(moto_kms.url, key_id)
    await provider.health()
    moto_kms.disable(key_id)
    with pytest.raises(CryptoError, match=f"with the key {key_id}: the key is disabled"):
        await provider.health()
    await provider.close()
    nowhere = at(moto_kms.url, "2f3c9f0a-0000-4000-8000-000000000000")
    with pytest.raises(CryptoError, match="no such key in this region"):
        await nowhere.health()
    await nowhere.close()


async def test_the_context_goes_to_kms_under_the_name_that_policies_use(
    scripted: ScriptedKms, refused: AwsKmsProvider
) -> None:
    scripted.body = {"CiphertextBlob": "AAAA", "KeyId": KEY_ID}
    await refused.wrap(KEY, context=NAME)
    [(operation, request)] = scripted.requests
    assert operation == "Encrypt"
    assert request["EncryptionContext"] == {CONTEXT_NAME: NAME}
    assert request["KeyId"] == KEY_ID
