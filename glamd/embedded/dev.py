"""`glamd dev`: the same daemon with everything that it needs beside it, and nothing installed.

PostgreSQL and NATS are children on loopback, authorities and secrets are made in the state
directory, two virtual terminals tap test cards over real MQTT and TLS, and a merchant buys credits
at a stand-in for its shop platform. The daemon itself is `glamd.app`'s, built from settings like
any other; what is special about development stands here and in this folder.
"""

import asyncio
import fcntl
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from glamd import app, logs
from glamd.admin import migrate
from glamd.admin.minting import Mint
from glamd.clock import SystemClock
from glamd.embedded import demo, demo_credits
from glamd.embedded.bus import EmbeddedBus
from glamd.embedded.certificates import DevelopmentCertificates
from glamd.embedded.describe import REWRITE_AFTER_S, CreditsDemo, Description
from glamd.embedded.postgres import EmbeddedPostgres, PostgresUrls
from glamd.embedded.screen import Screen
from glamd.embedded.settings import (
    LOOPBACK,
    WORKER_URI,
    Ports,
    development_settings,
    jwt_secrets,
    refuse_taken,
)
from glamd.errors import ConfigError
from glamd.service import signals

U_co = TypeVar("U_co", covariant=True)

DEFAULT_STATE_DIR: Final = Path(".glamd/dev")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for on the command line."""

    state_dir: Path
    ports: Ports
    demo: bool = True
    fresh: bool = False


async def run(options: Options) -> None:
    """Run until SIGINT or SIGTERM; ConfigError, UnavailableError when it cannot start."""
    began_s = time.monotonic()
    screen = Screen()
    state_dir = options.state_dir.absolute()
    refuse_taken(options.ports)
    with _owned(state_dir, fresh=options.fresh):
        with _logging_to(state_dir / "glamd.log"):
            stop_requested = asyncio.Event()
            with signals(stop=stop_requested):
                async with AsyncExitStack() as stack:
                    site = await _start(options, state_dir, screen, stack, stop_requested)
                    screen.ready(site, state_dir=state_dir, taken_s=time.monotonic() - began_s)
                    await _until_stopped(
                        site, state_dir, screen, stop_requested, plays=options.demo
                    )
                    screen.say("\nStopping: what is under way is finished.", style="dim")
        screen.say("Stopped.", style="dim")


async def _start(
    options: Options,
    state_dir: Path,
    screen: Screen,
    stack: AsyncExitStack,
    stop_requested: asyncio.Event,
) -> Description:
    urls = await stack.enter_async_context(database(state_dir, screen, stop_requested))
    screen.step("NATS JetStream, embedded")
    nats = EmbeddedBus(state_dir)
    bus = await stack.enter_async_context(_kept(nats, stop_requested))
    screen.step("migrations")
    await migrate.upgrade(urls.owner)
    screen.step("certificates, keys, secrets")
    clock = SystemClock()
    certificates = DevelopmentCertificates(state_dir, clock)
    buyer = demo_credits.Kept.of(state_dir / "demo")
    shopify = await stack.enter_async_context(demo_credits.platform(buyer, clock))
    settings = development_settings(
        state_dir,
        certificates,
        database_url=urls.app,
        nats_url=bus.url,
        ports=options.ports,
        changes=demo_credits.settings_for(shopify),
    )
    made = jwt_secrets(state_dir)
    daemon = await stack.enter_async_context(app.running(settings, stop_requested))
    http_url = f"http://{LOOPBACK}:{daemon.http_port}"
    shopify.webhooks_url = f"{http_url}/webhooks/shopify"
    mqtt = (LOOPBACK, daemon.mqtt_port)
    merchant_id, devices = await demo.seed(
        onboarding=daemon.onboarding,
        keys=daemon.keys,
        registry=daemon.registry,
        folder=state_dir / "demo",
        server_ca_pem=certificates.server_ca.certificate_file.read_bytes(),
        mqtt=mqtt,
    )
    await demo_credits.seed(daemon.onboarding, buyer)
    worker = certificates.worker(WORKER_URI)
    site = Description(
        pid=os.getpid(),
        http_url=http_url,
        worker_url=f"https://{LOOPBACK}:{daemon.worker_port}",
        server_ca=certificates.server_ca.certificate_file,
        worker_cert=worker.certificate_file,
        worker_key=worker.key_file,
        mqtt_host=mqtt[0],
        mqtt_port=mqtt[1],
        admin_socket=settings.admin.socket,
        database_url=urls.app,
        database_admin_url=urls.admin,
        nats_url=bus.url,
        merchant_id=str(merchant_id),
        domain=demo.DOMAIN,
        devices=devices,
        credits_demo=CreditsDemo(
            merchant_id=str(buyer.merchant_id),
            domain=demo_credits.DOMAIN,
            shopify_url=shopify.url,
        ),
        mint=Mint(client_secret=made.client, internal_secret=made.internal, clock=clock),
    )
    async with demo_credits.Storefront(http_url, kept=buyer, jwt=site.credits_jwt) as storefront:
        await storefront.connect_shop()
    return site


async def _until_stopped(
    site: Description,
    state_dir: Path,
    screen: Screen,
    stop_requested: asyncio.Event,
    *,
    plays: bool,
) -> None:
    """Keep `dev.json` true and let the demo play until the stop is asked for."""
    path = state_dir / "dev.json"

    async def describe() -> None:
        while True:
            site.write(path)
            await asyncio.sleep(REWRITE_AFTER_S)

    work = [("dev.json", describe())]
    if plays:
        work += _demo(site, state_dir, screen)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each, name=name) for name, each in work]
            await stop_requested.wait()
            path.unlink(missing_ok=True)
            for task in tasks:
                task.cancel()
    finally:
        path.unlink(missing_ok=True)


def _demo(
    site: Description, state_dir: Path, screen: Screen
) -> list[tuple[str, Coroutine[None, None, None]]]:
    """What goes on by itself, with names: a terminal each that taps, and a merchant that buys."""
    clock = SystemClock()
    taps = [
        (
            f"taps:{device.device_id}",
            demo.tap_for_ever(
                device, clock=clock, first_after_s=n * demo.TAP_EVERY_S / 2, show=screen.tap
            ),
        )
        for n, device in enumerate(site.devices)
    ]
    credits_demo = demo_credits.perform(
        url=site.http_url,
        nats_url=site.nats_url,
        kept=demo_credits.Kept.of(state_dir / "demo"),
        jwt=site.credits_jwt,
        clock=clock,
        audience=demo_credits.Audience(
            show=screen.happening, checkout=screen.checkout, trouble=screen.trouble
        ),
    )
    return [*taps, ("demo:credits", credits_demo)]


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Log to a file, and to stderr again at the end: what fails then must not fail to be told."""
    with path.open("a", encoding="utf-8") as stream:
        logs.configure(level="info", format="json", stream=stream)
        try:
            yield
        finally:
            logs.configure(level="warning", format="auto", stream=sys.stderr)


@contextmanager
def _owned(state_dir: Path, *, fresh: bool) -> Iterator[None]:
    """Hold the state directory for ourselves; `fresh` empties one that is ours already."""
    marker = state_dir / "glamd-dev"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Looked at before anything is put there: a directory that is not ours stays as it is.
        if not marker.exists() and any(entry.name != "lock" for entry in state_dir.iterdir()):
            raise ConfigError(f"{state_dir} is not empty and no state directory of glamd dev.")
        descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{state_dir} cannot be used: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"Another glamd dev runs in {state_dir}.") from None
        marker.touch(mode=0o600)
        if fresh:
            _empty(state_dir, but=(marker.name, "lock"))
        (state_dir / "dev.json").unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _empty(directory: Path, *, but: tuple[str, ...]) -> None:
    """Remove what is in it; the marker stays, so that half of it is known for ours at any time."""
    for entry in directory.iterdir():
        if entry.name in but:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@asynccontextmanager
async def database(
    state_dir: Path, screen: Screen, stop_requested: asyncio.Event
) -> AsyncIterator[PostgresUrls]:
    """The user's own server where DATABASE_URL names one, else a child."""
    given = os.environ.get("DATABASE_URL")
    if given:
        screen.step("PostgreSQL of DATABASE_URL")
        yield PostgresUrls(app=given, admin=given, owner=given)
        return
    screen.step("PostgreSQL, embedded")
    server = EmbeddedPostgres(state_dir, separate_owner=True)
    async with _kept(server, stop_requested) as urls:
        yield urls


class _Server(Protocol[U_co]):
    """A server that runs as a supervised child."""

    async def start(self) -> U_co: ...
    async def stop(self) -> None: ...
    async def wait(self) -> None: ...


@asynccontextmanager
async def _kept(server: _Server[U_co], stop_requested: asyncio.Event) -> AsyncIterator[U_co]:
    """A server as long as the context lasts, and how to reach it.

    A child that dies is restarted. Where that does not succeed the stop is asked for, and the end
    of the context raises UnavailableError with the server's last words.
    """
    try:
        reached = await server.start()
        given_up = asyncio.create_task(server.wait(), name=f"{type(server).__name__}-given-up")
        given_up.add_done_callback(lambda _: stop_requested.set())
        try:
            yield reached
        finally:
            if not given_up.cancel():
                given_up.result()
    finally:
        await server.stop()
