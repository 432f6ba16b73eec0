"""Every error code of the MQTT contract, provoked from outside over MQTT and TLS (spec 2)."""

import asyncio
import secrets
from pathlib import Path

import orjson
import pytest

from device_gateway.terminal_card import TEST_CARDS, DemoCard, clear_form
from device_gateway.terminal_device import Device
from glamd.crypto.dukpt import Profile
from glamd.errors import ConflictError
from glamd.payments.model import Format
from tests.support.site import BDK, VISA, Site, reader, running_site

CLEAR = clear_form(DemoCard(pan=VISA), "track2")


def request(device: Device, /, *, clear: bytes = CLEAR, **changes: object) -> bytes:
    """A good request of this device, with some fields changed after it was made."""
    payload = reader(device).request(secrets.token_hex(8), clear, "track2")
    return orjson.dumps(orjson.loads(payload) | changes)


async def tokens(site: Site) -> object:
    """How many tokens there are."""
    return await site.database.fetchval("SELECT count(*) FROM cde.payment_tokens")


async def spent(site: Site) -> object:
    """How many counters were spent."""
    return await site.database.fetchval("SELECT sum(version)::int FROM cde.device_counters")


async def test_what_is_not_json_is_malformed_and_answered_without_an_id(site: Site) -> None:
    answer = await site.ask(await site.enroll(), b"\x00\xffnot json")
    assert answer.code == "MALFORMED"
    assert answer.fields["id"] is None
    assert answer.fields["retryable"] is False


async def test_a_malformed_field_is_named_and_its_value_is_not_repeated(site: Site) -> None:
    device = await site.enroll()
    answer = await site.ask(device, request(device, ksn="4242424242424242zz"))
    assert answer.code == "MALFORMED"
    assert "ksn" in answer.text("message")
    assert "4242" not in str(answer.fields["message"])


@pytest.mark.parametrize(
    "changes", [{"v": 2}, {"type": "settle"}, {"scheme": "rsa"}, {"format": "track3"}]
)
async def test_what_is_not_served_is_unsupported(site: Site, changes: dict[str, object]) -> None:
    device = await site.enroll()
    changed = orjson.dumps(orjson.loads(request(device)) | changes)
    assert (await site.ask(device, changed)).code == "UNSUPPORTED"


async def test_a_certificate_of_ours_without_a_device_is_told_so(site: Site) -> None:
    device = await site.enroll()
    await site.database.execute("DELETE FROM cde.devices")
    assert (await site.ask(device, request(device))).code == "DEVICE_UNKNOWN"


async def test_a_suspended_device_is_refused_and_served_again_after_resume(site: Site) -> None:
    device = await site.enroll()
    payload = request(device)
    async with site.wire(device) as wire:
        assert (await wire.ask(request(device))).ok
        await site.daemon.registry.suspend(device.device_id)
        assert (await wire.ask(payload)).code == "DEVICE_SUSPENDED"
        await site.daemon.registry.resume(device.device_id)
        assert (await wire.ask(payload)).ok


async def test_a_device_that_was_revoked_elsewhere_is_refused(
    state_dir: Path, database_url: str
) -> None:
    # The watch is made slow, so that the answer comes from the session and not from a cut line.
    async with running_site(
        state_dir, database_url, changes={"devices": {"status_poll_s": 4.0}}
    ) as site:
        device = await site.enroll()
        async with site.wire(device) as wire:
            await site.database.execute("UPDATE cde.devices SET status = 'revoked'")
            assert (await wire.ask(request(device))).code == "DEVICE_REVOKED"


async def test_a_retired_key_set_is_unknown(site: Site) -> None:
    device = await site.enroll()
    await site.database.execute("UPDATE cde.key_sets SET status = 'retired'")
    assert (await site.ask(device, request(device))).code == "KEY_SET_UNKNOWN"


async def test_a_key_set_that_does_not_unwrap_is_our_fault_and_not_the_devices(site: Site) -> None:
    device = await site.enroll()
    await site.database.execute("UPDATE cde.key_sets SET wrapped_bdk = '\\x00'")
    answer = await site.ask(device, request(device))
    assert answer.code == "INTERNAL"
    assert answer.fields["retryable"] is True


async def test_another_devices_ksn_is_a_mismatch_and_spends_nothing(site: Site) -> None:
    device, other = await site.enroll(), await site.enroll()
    foreign = orjson.loads(request(other))["ksn"]
    assert (await site.ask(device, request(device, ksn=foreign))).code == "KSN_MISMATCH"
    tdes = await site.enroll("tdes")
    assert (await site.ask(device, request(tdes))).code == "KSN_MISMATCH"
    assert await spent(site) == 0


@pytest.mark.parametrize("counter", [0, 0x0001FFFF, 0xFFFFFFFF])
async def test_a_counter_that_devices_skip_is_invalid(site: Site, counter: int) -> None:
    device = await site.enroll()
    bad = request(device, ksn=device.ksn_at(counter).hex())
    assert (await site.ask(device, bad)).code == "KSN_INVALID"


@pytest.mark.parametrize("key_set", ["tdes", "aes"])
async def test_a_counter_used_before_is_replayed_under_any_other_id(
    site: Site, key_set: str
) -> None:
    device = await site.enroll(key_set)
    async with site.wire(device) as wire:
        first = request(device)
        assert (await wire.ask(first)).ok
        again = orjson.dumps(orjson.loads(first) | {"id": "another"})
        assert (await wire.ask(again)).code == "KSN_REPLAYED"
    assert await tokens(site) == 1


async def test_one_initial_key_under_two_names_has_one_set_of_counters(site: Site) -> None:
    # The same base key, imported under another name by mistake, derives the same initial keys.
    await site.daemon.keys.import_bdk(
        key_set="twin", profile=Profile(scheme="aes-dukpt"), bdk=BDK, actor="test"
    )
    first = await site.enroll()
    ksn = first.ksn_at(0)
    with pytest.raises(ConflictError):
        await site.enroll(ksn=ksn, key_set="twin")
    payload = request(first)
    assert (await site.ask(first, payload)).ok
    await site.daemon.registry.revoke(first.device_id)
    second = await site.enroll(ksn=ksn, key_set="twin")
    assert (await site.ask(second, payload)).code == "KSN_REPLAYED"


async def test_taps_stored_offline_pass_inside_the_window_and_are_too_old_behind_it(
    site: Site,
) -> None:
    await site.database.execute("UPDATE cde.key_sets SET counter_window = 8")
    device = await site.enroll()
    taps = [request(device) for _ in range(12)]
    async with site.wire(device) as wire:
        assert (await wire.ask(taps[11])).ok
        assert (await wire.ask(taps[4])).ok
        assert (await wire.ask(taps[3])).code == "KSN_TOO_OLD"
        assert (await wire.ask(taps[4])).replayed


@pytest.mark.parametrize("key_set", ["tdes", "aes"])
async def test_a_wrong_mac_is_refused_before_anything_is_decrypted_and_spends_nothing(
    site: Site, key_set: str
) -> None:
    device = await site.enroll(key_set)
    payload = reader(device).request("r1", CLEAR, "track2", mac=True)
    good = orjson.loads(payload)
    wrong = bytearray(bytes.fromhex(good["mac"]))
    wrong[0] ^= 1
    async with site.wire(device) as wire:
        refused = await wire.ask(orjson.dumps(good | {"mac": wrong.hex()}))
        assert refused.code == "MAC_INVALID"
        assert await spent(site) == 0
        assert (await wire.ask(payload)).ok


async def test_a_key_set_that_requires_a_mac_refuses_a_request_without_one(site: Site) -> None:
    await site.database.execute("UPDATE cde.key_sets SET mac = 'required'")
    device = await site.enroll()
    assert (await site.ask(device, request(device))).code == "MAC_INVALID"


@pytest.mark.parametrize(
    "clear", [b"garbage that is no track", b";4242424242424241=4912201?", b";42424242=4912201?"]
)
async def test_what_decrypts_to_no_card_fails_and_spends_its_counter_and_id(
    site: Site, clear: bytes
) -> None:
    device = await site.enroll()
    payload = request(device, clear=clear)
    async with site.wire(device) as wire:
        assert (await wire.ask(payload)).code == "DECRYPT_FAILED"
        again = await wire.ask(payload)
        assert again.code == "DECRYPT_FAILED"
        assert again.replayed
        other = orjson.dumps(orjson.loads(payload) | {"id": "other"})
        assert (await wire.ask(other)).code == "KSN_REPLAYED"
    assert await tokens(site) == 0
    assert await spent(site) == 1


async def test_an_id_with_other_content_is_refused_whatever_else_is_wrong_with_it(
    site: Site,
) -> None:
    device = await site.enroll()
    first = request(device, id="r1")
    fresh = request(device, id="r1")
    async with site.wire(device) as wire:
        assert (await wire.ask(first)).ok
        assert (await wire.ask(fresh)).code == "REQUEST_ID_REUSED"
        replayed_ksn = orjson.dumps(orjson.loads(first) | {"entry_mode": "manual"})
        assert (await wire.ask(replayed_ksn)).code == "REQUEST_ID_REUSED"
        bad_mac = orjson.dumps(orjson.loads(fresh) | {"mac": "00" * 8})
        assert (await wire.ask(bad_mac)).code == "REQUEST_ID_REUSED"
    assert await tokens(site) == 1
    assert await spent(site) == 1


async def test_a_device_over_its_rate_is_told_to_come_again(
    state_dir: Path, database_url: str
) -> None:
    slow = {"mqtt": {"rate_limit_per_s": 0.01, "rate_burst": 2}}
    async with running_site(state_dir, database_url, changes=slow) as site:
        device = await site.enroll()
        served = 0
        async with site.wire(device) as wire:
            while (answer := await wire.ask(request(device))).ok:
                served += 1
        # Its session starts anew, once, when the node hears that the device was enrolled.
        assert 2 <= served <= 4
        assert answer.code == "RATE_LIMITED"
        assert answer.fields["retryable"] is True
        # Refused for its rate only: nothing of it was used up.
        assert await spent(site) == served


async def test_a_fault_of_ours_is_internal_and_retryable_and_the_resend_succeeds(
    site: Site,
) -> None:
    device = await site.enroll()
    payload = request(device)
    async with site.wire(device) as wire:
        assert (await wire.ask(request(device))).ok
        # A missing table is our own fault, and is called so.
        await site.database.execute("ALTER TABLE cde.payment_tokens RENAME TO away")
        assert (await wire.ask(payload)).code == "INTERNAL"
        await site.database.execute("ALTER TABLE cde.away RENAME TO payment_tokens")
        answer = await wire.ask(payload)
        assert answer.ok
        assert not answer.replayed
    assert await tokens(site) == 2


async def test_cards_of_every_brand_and_format_become_tokens(site: Site) -> None:
    device = await site.enroll()
    source = reader(device)
    forms: tuple[Format, ...] = ("track1", "track2", "emv-tlv", "pan", "json")
    async with site.wire(device) as wire:
        for number, card in enumerate(TEST_CARDS):
            form = forms[number % len(forms)]
            payload = source.request(f"r{number}", clear_form(card, form), form)
            answer = await wire.ask(payload)
            assert answer.ok, answer
            assert answer.fields["last4"] == card.pan[-4:]


async def test_two_connections_never_make_two_tokens_of_one_request(site: Site) -> None:
    device = await site.enroll()
    payload = request(device)
    async with site.wire(device) as wire:
        answers = await asyncio.gather(*(wire.ask(payload) for _ in range(5)))
    assert len({answer.text("token") for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False, True, True, True, True]
    assert await tokens(site) == 1
