"""The connection to NATS: made again for ever, each time anew, with the stream that we need on it.

A `Link` is one life of the connection. Who uses it starts over when it is lost, with the next one.
nats-py's own reconnecting is off, for three reasons: it gives up on some errors of the server, what
it had buffered goes out late and could overtake what is sent anew, and a request under way would
wait for an answer that does not come any more.

What an event is, is not known here.
"""

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

import nats.errors
import structlog
from nats.aio.subscription import Subscription as Inbox
from nats.js import api
from nats.js.errors import APIError, NotFoundError
from prometheus_client import Gauge

from glamd.errors import ConfigError, UnavailableError
from glamd.events.client import NatsClient, OnMessage, heed_cancellation

STREAM: Final = "GLAM_EVENTS"
SUBJECTS: Final = ("evt.>", "cmd.>")
DAY_S: Final = 86_400

CONNECT_TIMEOUT_S: Final = 2
"""For each server, and for each step of the greeting."""

CONNECTING_LIMIT_S: Final = 10.0
"""For all servers together; then it begins again after a pause."""

API_TIMEOUT_S: Final = 5.0
PING_INTERVAL_S: Final = 5
PINGS_UNANSWERED: Final = 2
"""So that a server which hangs is given up after 15 s at most."""

FIRST_PAUSE_S: Final = 0.1
LAST_PAUSE_S: Final = 5.0
STEADY_S: Final = 10.0
"""After a link that lived so long the pauses begin anew; else they double."""

BUFFER_BYTES: Final = 2 * 1024 * 1024
"""What may wait for the socket; more makes the publisher wait."""

MAX_REASON_CHARS: Final = 200

log = structlog.get_logger()

_CONNECTED = Gauge("glamd_events_connected", "1 while there is a connection to NATS.")


class BusLostError(UnavailableError):
    """This link is no more; whether what was sent last has arrived is not known."""


class BusRefusedError(UnavailableError):
    """JetStream has answered, and will not; over another link it would say the same."""


class Link:
    """One life of the connection, used until it is lost."""

    def __init__(self, client: NatsClient) -> None:
        self._client = client
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jetstream = client.jetstream(timeout=API_TIMEOUT_S)

    @property
    def is_lost(self) -> bool:
        """Whether its end was noticed."""
        return self._lost.done()

    @property
    def max_payload_bytes(self) -> int:
        """The most that the server takes for a message: its headers and its body together."""
        return self._client.max_payload

    def inbox(self) -> str:
        """A subject of our own for answers."""
        return self._client.new_inbox()

    def drop(self) -> None:
        """Give the link up; the bus makes another, and the stream where that is gone."""
        if not self._lost.done():
            self._lost.set_result(None)

    async def publish(self, subject: str, body: bytes = b"", *, reply: str = "") -> None:
        """Hand a message to the connection, in order with all others; BusLostError."""
        try:
            await self._client.publish(subject, body, reply)
        except (nats.errors.Error, OSError) as error:
            raise self._gone(error) from None
        heed_cancellation()

    def send_built(self, subject: str, headers: bytes, body: bytes, *, reply: str) -> None:
        """The same at once, with a block of headers that is built already and names that are
        checked; BusLostError. Whoever sends much asks `is_full`, and then for `relief`."""
        try:
            self._client.send_built(subject, headers, body, reply)
        except (nats.errors.Error, OSError) as error:
            raise self._gone(error) from None

    @property
    def is_full(self) -> bool:
        """Whether as much waits for the socket as should."""
        return self._client.is_full

    async def relief(self) -> None:
        """Return when there is room again, and others had their turn; BusLostError."""
        try:
            await self._client.relieve()
        except (nats.errors.Error, OSError) as error:
            raise self._gone(error) from None
        heed_cancellation()

    async def subscribe(self, subject: str, on_message: OnMessage) -> Inbox:
        """Have messages to this subject taken one after the other, as they come; BusLostError."""
        try:
            return await self._client.subscribe_taker(subject, on_message)
        except (nats.errors.Error, OSError) as error:
            raise self._gone(error) from None

    async def close_inbox(self, inbox: Inbox, *, timeout_s: float) -> None:
        """Let no more come, and return when all that had come is handled, or the time is over."""
        drain: Callable[[], Awaitable[None]] = inbox.drain
        with suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                await drain()

    async def flush(self, *, timeout_s: float) -> None:
        """Return when the server has read all that was published; BusLostError."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.flush()
        except (nats.errors.Error, OSError) as error:
            raise self._gone(error) from None
        heed_cancellation()

    async def until(self, future: asyncio.Future[None], *, timeout_s: float) -> None:
        """Wait for the future; BusLostError when the link goes first, TimeoutError."""
        done, _ = await asyncio.wait(
            (future, self._lost), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if future in done:
            return
        if self._lost.done():
            raise BusLostError("The connection to NATS is lost.")
        raise TimeoutError

    async def wait_lost(self) -> None:
        """Return when the link is lost."""
        await asyncio.wait((self._lost,))

    async def ensure_stream(self, *, max_age_s: float, replicas: int) -> None:
        """Make the stream where it is absent; one that is there is used as it is."""
        with suppress(NotFoundError):
            await self._asked(self._jetstream.stream_info(STREAM))
            return
        config = api.StreamConfig(
            name=STREAM,
            subjects=list(SUBJECTS),
            storage=api.StorageType.FILE,
            retention=api.RetentionPolicy.LIMITS,
            discard=api.DiscardPolicy.OLD,
            max_age=max_age_s,
            num_replicas=replicas,
        )
        await self._asked(self._jetstream.add_stream(config))
        log.info("stream_made", stream=STREAM)

    async def ensure_consumer(self, config: api.ConsumerConfig) -> None:
        """Make a durable consumer, or bring it to this configuration.

        Where it begins is settled when it is made: JetStream refuses to be told otherwise later.
        """
        with suppress(NotFoundError):
            begun = (await self.consumer(config.durable_name or "")).config
            config = config.evolve(
                deliver_policy=begun.deliver_policy,
                opt_start_seq=begun.opt_start_seq,
                opt_start_time=begun.opt_start_time,
            )
        await self._asked(self._jetstream.add_consumer(STREAM, config))

    async def consumer(self, name: str) -> api.ConsumerInfo:
        """How far a durable consumer is."""
        found = await self._asked(self._jetstream.consumer_info(STREAM, name))
        assert isinstance(found, api.ConsumerInfo)
        return found

    async def close(self) -> None:
        """Close the connection; what waits to be written is written if that is possible."""
        self.drop()
        await self._client.end()

    async def _asked(self, call: Coroutine[Any, Any, object]) -> object:
        """An answer of JetStream's management.

        nats-py's NotFoundError shows what is absent, everything else is UnavailableError.
        """
        asking = asyncio.create_task(call)
        try:
            # A lost link will not answer, and nats-py would wait for it.
            await asyncio.wait((asking, self._lost), return_when=asyncio.FIRST_COMPLETED)
            answered = asking.done()
        finally:
            asking.cancel()
        if not answered:
            raise BusLostError("The connection to NATS is lost.")
        try:
            return asking.result()
        except NotFoundError:
            raise
        except APIError as error:
            what = str(error.description or "an error")[:MAX_REASON_CHARS]
            raise BusRefusedError(f"JetStream: {what} ({error.err_code}).") from None
        except nats.errors.NoRespondersError:
            raise UnavailableError("The server has no JetStream.") from None
        except (nats.errors.Error, OSError) as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> BusLostError:
        if not isinstance(error, TimeoutError):
            self.drop()
        return BusLostError(f"NATS: {_why(error)}.")


class Bus:
    """Keeps a link to one of the servers for as long as `run` runs."""

    def __init__(
        self,
        servers: Sequence[str],
        *,
        name: str,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        stream_max_age_s: float = 7 * DAY_S,
        stream_replicas: int = 1,
    ) -> None:
        """`servers` are URLs, `nats://` or `tls://`, which may carry `user:password@`.

        With `tls`, or where one of the URLs is `tls://`, a server that offers no TLS is refused
        before it is told any of this. Age and replicas are of a stream that we have to make.
        ConfigError for a URL that cannot be read.
        """
        urls = [_checked(url) for url in servers]
        if not urls:
            raise ConfigError("No NATS server is named.")
        if tls is None and any(url.startswith("tls:") for url in urls):
            tls = ssl.create_default_context()
        self._tls = tls
        self._options: Mapping[str, Any] = {
            "servers": urls,
            "name": name,
            "user": user,
            "password": password,
            "token": token,
            "tls": tls,
        }
        self._stream_max_age_s = stream_max_age_s
        self._stream_replicas = stream_replicas
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._trouble: str | None = "NATS: not connected yet."
        _CONNECTED.set_function(lambda: self._link is not None)

    def trouble(self) -> str | None:
        """Why there is no link now, in one line for an operator; None while there is one."""
        return self._trouble

    @property
    def current(self) -> Link | None:
        """The link, where there is one."""
        return self._link

    async def link(self) -> Link:
        """The link, as soon as there is one."""
        while self._link is None or self._link.is_lost:
            await self._up.wait()
            # The link of this moment may be lost and not taken away yet.
            await asyncio.sleep(0)
        return self._link

    async def run(self) -> None:
        """Connect, and connect again whenever the link is lost, until cancelled."""
        loop = asyncio.get_running_loop()
        pause_s = FIRST_PAUSE_S
        while True:
            began_s = loop.time()
            try:
                await self._live()
            except UnavailableError as error:
                self._note(error.message)
            if loop.time() - began_s >= STEADY_S:
                pause_s = FIRST_PAUSE_S
            # Spread, so that not all nodes come back at the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            pause_s = min(pause_s * 2, LAST_PAUSE_S)

    async def _live(self) -> None:
        """One link from its making to its end."""
        link = await self._connect()
        try:
            try:
                await link.ensure_stream(
                    max_age_s=self._stream_max_age_s, replicas=self._stream_replicas
                )
            except NotFoundError:
                raise UnavailableError("JetStream knows no stream and makes none.") from None
            self._link, self._trouble = link, None
            self._up.set()
            log.info("bus_connected")
            await link.wait_lost()
            self._note("NATS: the connection is lost.")
        finally:
            self._link = None
            self._up.clear()
            await link.close()

    async def _connect(self) -> Link:
        client = NatsClient(wants_tls=self._tls is not None)

        async def failed(error: Exception) -> None:
            if isinstance(error, nats.errors.SlowConsumerError):
                # It is never asked for more than fits; what it dropped comes again.
                log.warning("bus_dropped_messages")
            elif not isinstance(error, nats.errors.Error | OSError):
                log.error("bus_callback_crashed", exc_info=error)

        try:
            async with asyncio.timeout(CONNECTING_LIMIT_S):
                await client.connect(
                    **self._options,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_TIMEOUT_S,
                    ping_interval=PING_INTERVAL_S,
                    max_outstanding_pings=PINGS_UNANSWERED,
                    pending_size=BUFFER_BYTES,
                    flush_timeout=API_TIMEOUT_S,
                    error_cb=failed,
                )
            heed_cancellation()
        except asyncio.CancelledError:
            await client.end()
            raise
        except Exception as error:  # noqa: BLE001 - whatever a stranger says, it is no server of ours
            await client.end()
            raise UnavailableError(f"NATS: {_why(error)}.") from None
        link = Link(client)
        client.when_over(link.drop)
        return link

    def _note(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("bus_unavailable", reason=trouble)
        self._trouble = trouble


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("nats", "tls") and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        # The URL may carry a password, so it is not shown.
        raise ConfigError("A NATS URL is nats://host:port or tls://host:port.")
    return url


def _why(error: Exception) -> str:
    """The error in words that hold no address and no login."""
    if isinstance(error, ssl.SSLError):
        return "TLS fails"
    if isinstance(error, nats.errors.SecureConnWantedError):
        return "TLS is wanted and the server offers none"
    if "authorization" in str(error).lower():
        return "the server refuses our login"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError | nats.errors.NoServersError):
        return "no server can be reached"
    return f"the connection fails ({type(error).__name__})"
