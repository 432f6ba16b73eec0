"""What retiring a key set, rekeying a device and rotating its certificate do to live terminals."""

import asyncio
import secrets
from dataclasses import replace
from pathlib import Path

import aiomqtt
import orjson
import psec
import pytest

from device_gateway.model import DeviceChange
from device_gateway.terminal_card import DemoCard, clear_form
from device_gateway.terminal_device import Device
from glamd.crypto import dukpt
from glamd.crypto.dukpt import key_check_value
from tests.support.site import VISA, Site, Wire, reader, running_site

CLEAR = clear_form(DemoCard(pan=VISA), "track2")
NOTICED_S = 5.0
"""How long another node may take to notice; the promise is about a second."""


def request(device: Device) -> bytes:
    """A good request of this device, with its next counter."""
    return reader(device).request(secrets.token_hex(8), CLEAR, "track2")


async def nobody_told(change: DeviceChange) -> None:
    """Stand in for the gateway of the node that was commanded."""


@pytest.fixture(params=["here", "elsewhere"])
def commanded(request: pytest.FixtureRequest, site: Site, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which node was commanded: that of the terminal, or one that cannot tell it."""
    where: str = request.param
    if where == "elsewhere":
        monkeypatch.setattr(site.daemon.registry, "_changed", nobody_told)
    return where


async def becomes(wire: Wire, device: Device, code: str) -> None:
    """Ask until this is the answer."""
    async with asyncio.timeout(NOTICED_S):
        while (await wire.ask(request(device))).code != code:
            pass


async def rekeyed(site: Site, device: Device, key_set: str = "aes") -> Device:
    """The same terminal after it was injected anew."""
    ksn = b"\x12\x34\x56\x78" + secrets.token_bytes(4) + bytes(4)
    made = await site.daemon.registry.rekey(
        device.device_id, ksn=ksn, key_set=key_set, export_initial_key=True, actor="test"
    )
    assert made.initial_key is not None
    device.counter_path.unlink(missing_ok=True)
    return replace(
        device,
        key_id=dukpt.initial_key_id("aes-dukpt", ksn),
        scheme="aes-dukpt",
        key_set=key_set,
        initial_key=bytes.fromhex(made.initial_key),
    )


async def test_a_live_terminal_of_a_retired_key_set_is_refused_and_others_are_not(
    site: Site,
) -> None:
    device, other = await site.enroll("aes"), await site.enroll("tdes")
    async with site.wire(device) as wire, site.wire(other) as others:
        assert (await wire.ask(request(device))).ok
        reply = await site.admin.post("/v1/key-sets/aes/retire")
        assert reply.status == 200
        await becomes(wire, device, "KEY_SET_UNKNOWN")
        assert (await others.ask(request(other))).ok
    outcome = await site.database.fetchval(
        "SELECT outcome FROM cde.decrypt_audit_log WHERE action = 'bdk.retire' AND subject = 'aes'"
    )
    assert outcome == "ok"


@pytest.mark.usefixtures("commanded")
async def test_a_rekeyed_terminal_pays_with_its_new_key_only_over_the_connection_it_has(
    site: Site,
) -> None:
    device = await site.enroll("tdes")
    async with site.wire(device) as wire:
        assert (await wire.ask(request(device))).ok
        old = request(device)
        renewed = await rekeyed(site, device)
        async with asyncio.timeout(NOTICED_S):
            while (await wire.ask(request(renewed))).code == "KSN_MISMATCH":
                pass
        assert (await wire.ask(request(renewed))).ok
        assert (await wire.ask(old)).code == "KSN_MISMATCH"
        other_id = orjson.dumps(orjson.loads(old) | {"id": "x"})
        assert (await wire.ask(other_id)).code == "KSN_MISMATCH"


@pytest.mark.usefixtures("commanded")
async def test_the_certificate_before_is_cut_off_and_refused_and_the_new_one_is_served(
    site: Site, tmp_path: Path
) -> None:
    device = await site.enroll()
    async with site.wire(device) as wire:
        assert (await wire.ask(request(device))).ok
        made = await site.daemon.registry.rotate_certificate(device.device_id, csr_pem=None)
        with pytest.raises(aiomqtt.MqttError):
            await wire.answer()
    with pytest.raises(aiomqtt.MqttError):
        async with site.wire(device):
            pass
    assert made.private_key_pem is not None
    (tmp_path / "cert.pem").write_text(made.certificate_pem)
    (tmp_path / "key.pem").write_text(made.private_key_pem)
    fresh = replace(device, key=tmp_path / "key.pem", cert=tmp_path / "cert.pem")
    counters = device.counter_path
    (tmp_path / counters.name).write_bytes(counters.read_bytes())
    async with site.wire(fresh) as wire:
        assert (await wire.ask(request(fresh))).ok


async def test_a_certificate_whose_time_is_over_is_refused_also_where_tls_did_not_look_again(
    site: Site,
) -> None:
    device = await site.enroll()
    async with site.wire(device) as wire:
        assert (await wire.ask(request(device))).ok
    # To TLS it is as good as ever, as it is where a session is resumed.
    await site.database.execute(
        "UPDATE cde.devices SET certificate_expires_at = now() WHERE device_id = $1",
        device.device_id,
    )
    with pytest.raises(aiomqtt.MqttError):
        async with site.wire(device):
            pass


async def test_a_terminal_under_its_own_certificate_stays_connected_whatever_else_changes(
    site: Site,
) -> None:
    device = await site.enroll()
    async with site.wire(device) as wire:
        await site.daemon.registry.suspend(device.device_id)
        assert (await wire.ask(request(device))).code == "DEVICE_SUSPENDED"
        await site.daemon.registry.resume(device.device_id)
        assert (await wire.ask(request(device))).ok


async def test_the_admin_socket_rekeys_and_rotates(state_dir: Path, database_url: str) -> None:
    async with running_site(state_dir, database_url) as site:
        device = await site.enroll("tdes")
        path = f"/v1/devices/{device.device_id}"
        body = {"ksn": "123456789ABCDEF000000000", "key_set": "aes", "export_initial_key": True}
        reply = await site.admin.post(f"{path}/rekey", json=body)
        found = await reply.json()
        assert (reply.status, found["device"]["key_set"]) == (200, "aes")
        assert len(found["initial_key"]) == 32
        again = await site.admin.post(f"{path}/rekey", json=body)
        assert (again.status, (await again.json())["code"]) == (409, "KSN_IN_USE")
        reply = await site.admin.post(f"{path}/rotate-certificate", json={})
        found = await reply.json()
        assert found["private_key_pem"].startswith("-----BEGIN PRIVATE KEY-----")
        rows = await site.database.fetch(
            "SELECT outcome FROM cde.decrypt_audit_log WHERE action = 'device.rekey' ORDER BY seq"
        )
        assert [row[0] for row in rows] == ["ok", "KSN_IN_USE"]


async def test_a_key_that_came_in_a_key_block_takes_payments(site: Site) -> None:
    parts = [secrets.token_bytes(32), secrets.token_bytes(32)]
    kbpk = bytes(one ^ other for one, other in zip(*parts, strict=True))
    block = psec.tr31.wrap(kbpk, "D0000B0AX00N0000", secrets.token_bytes(16))
    typed = [
        {"holder": holder, "hex": part.hex(), "kcv": key_check_value(part, "aes-dukpt")}
        for holder, part in zip(("Ann", "Ben"), parts, strict=True)
    ]
    body = {"key_set": "block", "scheme": "aes-dukpt", "key_block": block, "kbpk": typed}
    wrong = await site.admin.post("/v1/key-sets", json=body | {"scheme": "tdes-dukpt"})
    named = [error["field"] for error in (await wrong.json())["errors"]]
    assert (wrong.status, named) == (422, ["key_block.algorithm"])
    assert (await site.admin.post("/v1/key-sets", json=body)).status == 201
    device = await site.enroll("block")
    assert (await site.ask(device, request(device))).ok
    rows = await site.database.fetch(
        "SELECT action, actor, outcome FROM cde.decrypt_audit_log"
        " WHERE subject LIKE '%block%' ORDER BY seq"
    )
    told = [(row["action"], row["actor"].partition(" for ")[2], row["outcome"]) for row in rows]
    ceremony = [("kbpk.component", "Ann", "ok"), ("kbpk.component", "Ben", "ok")]
    ends = [("bdk.import", "", "VALIDATION_ERROR"), ("bdk.import", "", "ok")]
    assert told == [ends[0], *ceremony, ends[1]]
