"""Key providers under a whole daemon: moved from one to the next by restarts, killed, and away.

One installation each, its configuration file changed as docs/key-providers.md tells operators to.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from device_gateway.terminal import Answer, Terminal
from device_gateway.terminal_device import Device, load_device
from glamd.db import Database
from glamd.embedded.settings import WORKER
from tests.support.dev_client import Reply, ask, call, connected, tap
from tests.support.gated_kms import GatedKms
from tests.support.kms import CREDENTIALS, REGION, MotoKms
from tests.support.postgres import eventually
from tests.support.run_daemon import LOOPBACK, RunDaemon, supervised
from tests.support.softhsm import MODULE, PACKAGE, TOKEN, SoftHsm

BDK = "0123456789ABCDEFFEDCBA9876543210"
KEYS = ["audit:v1", "fingerprints:v1", "payment-tokens:v1", "platform-tokens:v1", "bdk:lane"]
TIMEOUT_S = 15.0
PAN = "4242424242424242"
GRANT = {
    "name": WORKER,
    "purposes": ["settlement"],
    "fields": ["pan"],
    "merchants": "*",
    "rate_per_s": 100,
}
MAKE_KEK = """
import asyncio, pathlib, sys
from glamd.keys.providers.hsm import TokenAddress
from glamd.keys.providers.pkcs11 import Pkcs11Provider
module, label, pin = sys.argv[1:]
address = TokenAddress(module=pathlib.Path(module), token_label=label, pin_file=pathlib.Path(pin))
asyncio.run(Pkcs11Provider(address, kek_label="glamd-kek").create_kek())
"""


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoKms]:
    """A KMS over real HTTP."""
    server = MotoKms()
    yield server
    server.stop()


@pytest.fixture
async def kms(moto: MotoKms) -> AsyncIterator[GatedKms]:
    """The way to it."""
    async with GatedKms(moto.url).running() as gate:
        yield gate


class Installation:
    """One installation under an operator, a worker and a terminal."""

    def __init__(self, daemon: RunDaemon, kms: GatedKms, kms_key_id: str) -> None:
        daemon.environment |= CREDENTIALS
        daemon.settings["keys"] |= {
            "kms_key_id": kms_key_id,
            "kms_region": REGION,
            "kms_endpoint_url": kms.url,
        }
        self.daemon = daemon
        self.merchant_id = str(uuid4())
        self.ports: dict[str, int] = {}
        self._enrolled = 0

    @asynccontextmanager
    async def restarted(self, provider: str, *former: str) -> AsyncIterator[None]:
        """It runs with these key providers."""
        self.daemon.settings["keys"] |= {"provider": provider, "former_providers": former}
        self.daemon.write()
        context = supervised(self.daemon)
        await asyncio.to_thread(context.__enter__)
        try:
            self.ports = await asyncio.to_thread(self.daemon.listeners)
            yield
        finally:
            await asyncio.to_thread(context.__exit__, None, None, None)

    async def glamctl(self, *words: str) -> Any:
        """What a command answers."""
        return await asyncio.to_thread(self.daemon.glamctl, *words)

    async def furnish(self) -> None:
        """A merchant and a key set."""
        await self.glamctl(
            *("merchant", "create", "--platform", "custom", "--shop-id", "1"),
            *("--domain", "shop.example", "--id", self.merchant_id),
        )
        await self.glamctl("keys", "import-bdk", "lane", "--scheme", "aes-dukpt", "--clear", BDK)

    async def operator(self, path: str, body: Mapping[str, object]) -> Reply:
        """What the admin socket answers."""
        connector = aiohttp.UnixConnector(str(self.daemon.directory / "admin.sock"))
        async with aiohttp.ClientSession(connector=connector) as session:
            answer = await session.post(f"http://glamd{path}", json=body)
            return Reply(answer.status, await answer.json())

    def next_device(self) -> dict[str, str]:
        """What enrolling one more takes."""
        self._enrolled += 1
        ksn = f"{self._enrolled:016X}00000000"
        return {"merchant_id": self.merchant_id, "key_set": "lane", "ksn": ksn}

    async def enroll(self) -> Device:
        """A new terminal."""
        wanted = self.next_device()
        out = self.daemon.directory / wanted["ksn"]
        await self.glamctl(
            *("device", "enroll", "--merchant", self.merchant_id, "--key-set", "lane"),
            *("--ksn", wanted["ksn"], "--export-initial-key", "--out", str(out)),
        )
        return load_device(out)

    def reached(self, device: Device) -> Device:
        """The same terminal, told where the endpoint is since the last start."""
        return device.at_address(LOOPBACK, self.ports["mqtt"])

    async def tapped(self, device: Device) -> str:
        """The token of one tap over a connection of its own."""
        [answer] = await ask(self.reached(device), tap(device, uuid4().hex))
        assert answer.ok, answer
        return answer.text("token")

    async def says_that_the_provider_is(self, *, away: bool) -> None:
        """Wait until /readyz, which goes on to be a 200, names it as degraded, or no more."""

        async def said() -> bool:
            found = await call("GET", f"http://{LOOPBACK}:{self.ports['http']}/readyz")
            assert found.status == 200
            return ("key-provider" in found.data["degraded"]) is away

        await eventually(said)

    async def opens(self, token: str) -> None:
        """A worker sees the card under it."""
        url = (
            f"https://{LOOPBACK}:{self.ports['worker']}/internal/v1/payment-tokens/{token}/decrypt"
        )
        body = {"purpose": "settlement", "fields": ["pan"]}
        reply = await call("POST", url, json=body, ssl=self.daemon.as_worker())
        assert (reply.status, reply.body["data"]["pan"]) == (200, PAN)

    async def keys_held(self) -> dict[str, int]:
        """How many keys each provider holds."""
        return {each["provider"]: each["keys"] for each in await self.glamctl("keys", "providers")}

    async def rewrapped(self) -> dict[str, str]:
        """What came of each key."""
        report = await self.glamctl("keys", "rewrap", "--yes")
        return {each["key"]: each["outcome"] for each in report["keys"]}


@pytest.fixture
def installation(state_dir: Path, database_url: str, moto: MotoKms, kms: GatedKms) -> Installation:
    """It has not run yet; its worker may see card numbers."""
    grants = {"worker": {"grants": json.dumps([GRANT])}}
    daemon = RunDaemon(state_dir, database_url, changes=grants)
    return Installation(daemon, kms, moto.create_key())


@pytest.fixture
def hsm(
    installation: Installation,
    debian_program: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> SoftHsm:
    """A token with the KEK in it, which the daemon finds; this process never begins the module."""
    debian_program(str(MODULE), PACKAGE)
    monkeypatch.setenv("SOFTHSM2_CONF", "none")
    made = SoftHsm(tmp_path)
    installation.daemon.environment["SOFTHSM2_CONF"] = os.environ["SOFTHSM2_CONF"]
    installation.daemon.settings["keys"] |= {
        "pkcs11_module": str(MODULE),
        "pkcs11_token_label": TOKEN,
        "pkcs11_pin_file": str(made.pin_file),
    }
    subprocess.run(
        [sys.executable, "-c", MAKE_KEK, str(MODULE), TOKEN, str(made.pin_file)],
        check=True,
        timeout=TIMEOUT_S,
    )
    return made


async def test_a_provider_that_is_away_refuses_what_needs_it_and_nothing_else(
    installation: Installation, kms: GatedKms
) -> None:
    async with installation.restarted("aws-kms"):
        await installation.furnish()
        device = installation.reached(await installation.enroll())
        async with connected(device) as terminal:
            assert (await asked(terminal, device)).ok
            await kms.leave()
            refused = await installation.operator("/v1/devices", installation.next_device())
            assert (refused.status, refused.body["code"]) == (503, "UNAVAILABLE")

            await installation.says_that_the_provider_is(away=True)
            assert (await asked(terminal, device)).ok
            await installation.opens(await installation.tapped(device))
            await kms.come_back()

            await installation.says_that_the_provider_is(away=False)
            await installation.tapped(await installation.enroll())


async def test_a_rewrap_that_was_killed_is_begun_again_and_every_token_opens(
    installation: Installation, kms: GatedKms, database: Database
) -> None:
    async with installation.restarted("local"):
        await installation.furnish()
        device = await installation.enroll()
        token = await installation.tapped(device)
    async with installation.restarted("aws-kms", "local"):
        kms.shut_after(2)
        cut = asyncio.create_task(installation.operator("/v1/key-providers/rewrap", {}))
        async with asyncio.timeout(TIMEOUT_S):
            await kms.held_up.wait()
        installation.daemon.signal(signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await cut
        await asyncio.to_thread(installation.daemon.ended)
    kms.open()
    async with installation.restarted("aws-kms", "local"):
        await installation.opens(token)
        assert await installation.keys_held() == {"aws-kms": 2, "local": 3}
        moved = dict.fromkeys(KEYS[:2], "current") | dict.fromkeys(KEYS[2:], "rewrapped")
        assert await installation.rewrapped() == moved
        await installation.opens(token)
        await installation.opens(await installation.tapped(device))
        assert (await installation.glamctl("audit", "verify"))["ok"] is True
    rows = await database.fetch(
        "SELECT subject FROM cde.decrypt_audit_log WHERE action = 'keys.rewrap' ORDER BY seq"
    )
    assert [row["subject"] for row in rows] == KEYS


@pytest.mark.debian
async def test_an_installation_moves_from_local_to_kms_to_an_hsm_and_each_lets_go_of_the_other(
    installation: Installation, hsm: SoftHsm
) -> None:
    assert hsm.pin_file.exists()
    async with installation.restarted("local"):
        await installation.furnish()
        device = await installation.enroll()
        tokens = [await installation.tapped(device)]
    for provider, former in (("aws-kms", "local"), ("pkcs11", "aws-kms")):
        async with installation.restarted(provider, former):
            terminal_device = installation.reached(device)
            async with connected(terminal_device) as terminal:
                assert (await asked(terminal, terminal_device)).ok
                assert await installation.rewrapped() == dict.fromkeys(KEYS, "rewrapped")
                answer = await asked(terminal, terminal_device)
            tokens.append(answer.text("token"))
            assert await installation.keys_held() == {provider: len(KEYS), former: 0}
    del installation.daemon.settings["keys"]["kek_file"]
    async with installation.restarted("pkcs11"):
        for token in (*tokens, await installation.tapped(await installation.enroll())):
            await installation.opens(token)
        [bdk] = await installation.glamctl("keys", "list-bdk")
        assert bdk["hsm_label"] == f"glamd-bdk-lane-{bdk['kcv']}"


async def asked(terminal: Terminal, device: Device) -> Answer:
    """The answer to one more tap."""
    request_id = uuid4().hex
    return await terminal.ask(request_id, tap(device, request_id), timeout_s=TIMEOUT_S)
