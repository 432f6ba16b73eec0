"""Asking a platform's token endpoint for a new pair (RFC 6749, 6): one bounded POST, no second one.

The wire only: where it may go is `settings`', what the answer means `answers`', and when to ask is
`service`'s. Redirects are not followed, nothing is unpacked, no cookie is kept, no proxy comes out
of the environment, and no connection is used twice: a refresh has an effect, and a connection that
breaks under a second use would leave open whether it had it.
"""

import asyncio
import ssl
from collections.abc import Callable
from types import SimpleNamespace
from typing import Final, TypeAlias
from urllib.parse import quote_plus, urlencode

import aiohttp
from aiohttp.abc import AbstractResolver

from glamd.clock import Clock
from glamd.credentials.model import REFRESH_TOKEN, Secret, ShopConnection
from glamd.credentials.refresh.answers import RawAnswer, RefreshError, Renewed, judge
from glamd.credentials.refresh.settings import OAuthSettings

ANSWER_LIMIT_BYTES: Final = 64 * 1024

_HEADERS: Final = {
    "Content-Type": "application/x-www-form-urlencoded",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "glamd",
}


Sending: TypeAlias = Callable[[], None]
"""Called when a request is about to be written: from then on it may have its effect."""


def open_session(
    *,
    connections: int,
    tls: ssl.SSLContext | None = None,
    resolver: AbstractResolver | None = None,
) -> aiohttp.ClientSession:
    """A session for OAuthClients, with at most so many connections at once.

    `tls` is for a certificate authority of one's own, `resolver` for names of one's own.
    """
    connector = aiohttp.TCPConnector(
        limit=connections,
        force_close=True,
        ssl=True if tls is None else tls,
        resolver=resolver,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        trace_configs=[_told_of_sending()],
    )


class OAuthClient:
    """Speaks to the token endpoints of one platform."""

    def __init__(
        self, settings: OAuthSettings, *, session: aiohttp.ClientSession, clock: Clock
    ) -> None:
        self.settings = settings
        self._session = session
        self._clock = clock

    async def renew(
        self, connection: ShopConnection, secret: Secret, *, sending: Sending
    ) -> Renewed:
        """Use the refresh token once and return what came for it, within `timeout_s`.

        RefreshError in every other case; after some of those (TIMEOUT, CONNECTION_FAILED, NOT_JSON
        and the like) the platform may have replaced the pair all the same.
        """
        settings = self.settings
        url = settings.url_for(connection)
        if url is None:
            raise RefreshError("HOST_NOT_ALLOWED", remedy="operator")
        refresh_token = secret.refresh_token
        if refresh_token is None:
            raise RefreshError("NO_REFRESH_TOKEN", remedy="merchant")
        sent_at = self._clock.now()
        try:
            async with asyncio.timeout(settings.timeout_s):
                answer = await self._post(url, refresh_token, sending)
        # What these carry names hosts at most; still, nothing of it travels on.
        except TimeoutError:
            raise RefreshError("TIMEOUT") from None
        except (aiohttp.ClientSSLError, ssl.SSLError):
            raise RefreshError("TLS_FAILED") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise RefreshError("CONNECTION_FAILED") from None
        return judge(
            answer, secret, sent_at=sent_at, assumed_lifetime_s=settings.assumed_lifetime_s
        )

    async def _post(self, url: str, refresh_token: str, sending: Sending) -> RawAnswer:
        form = {"grant_type": "refresh_token", REFRESH_TOKEN: refresh_token}
        headers = dict(_HEADERS)
        if self.settings.client_auth == "basic":
            headers["Authorization"] = self._basic()
        else:
            form |= {
                "client_id": self.settings.client_id,
                "client_secret": self.settings.client_secret,
            }
        async with self._session.post(
            url,
            data=urlencode(form).encode(),
            headers=headers,
            allow_redirects=False,
            trace_request_ctx=sending,
        ) as response:
            return RawAnswer(
                status=response.status,
                retry_after=response.headers.get("Retry-After"),
                body=await _bounded(response.content),
            )

    def _basic(self) -> str:
        """Both parts are form-encoded before they are put together (RFC 6749, 2.3.1)."""
        return aiohttp.encode_basic_auth(
            quote_plus(self.settings.client_id), quote_plus(self.settings.client_secret)
        )


def _told_of_sending() -> aiohttp.TraceConfig:
    """Calls a request's `Sending` when it has a connection and nothing of it is written yet."""

    async def tell(
        _session: aiohttp.ClientSession,
        context: SimpleNamespace,
        _request: aiohttp.TraceRequestHeadersSentParams,
    ) -> None:
        sending: Sending = context.trace_request_ctx
        sending()

    config = aiohttp.TraceConfig()
    config.on_request_headers_sent.append(tell)
    return config


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    while chunk := await content.read(ANSWER_LIMIT_BYTES):
        body += chunk
        if len(body) > ANSWER_LIMIT_BYTES:
            raise RefreshError("ANSWER_TOO_LARGE")
    return bytes(body)
