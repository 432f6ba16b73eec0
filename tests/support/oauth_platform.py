"""A shop platform's token endpoint that speaks the real HTTP, and misbehaves when it is told to.

It checks the form, the grant type and who the client is, and replaces the refresh token at each
use. What becomes of the one before is the platform's choice:

* `retains` (as Shopify, since 2026-08-28): it stays good until its replacement is used; using it
  again withdraws the replacement that never arrived and makes another;
* otherwise it is dead at once, and so is the merchant's connection where an answer got lost.

By hand: `python -m tests.support.oauth_platform --port 8090` prints the token data of a new grant;
`curl -X POST 'localhost:8090/stand-in/misbehave?answer=error-page&takes_effect=1'` is for the next
request, `curl -X POST localhost:8090/stand-in/grants` makes a further grant.
"""

import argparse
import asyncio
import base64
import binascii
import secrets
import ssl
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self, get_args
from urllib.parse import unquote_plus

import orjson
from aiohttp import web

PATH: Final = "/admin/oauth/access_token"
ELSEWHERE: Final = "/elsewhere"
LIFETIME_S: Final = 3600
REFRESH_LIFETIME_S: Final = 90 * 86_400
SCOPES: Final = "read_products,write_orders"
HUGE_BYTES: Final = 1024 * 1024
PATIENCE_S: Final = 10.0

Answer = Literal["proper", "cut", "500", "503", "error-page", "429", "not-json", "huge", "redirect"]

_ERROR_PAGE: Final = "<html><body><h1>Something went wrong</h1>{}</body></html>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """How one request is treated.

    `takes_effect` says that the pair is replaced whatever the answer is; `is_late` that the answer
    waits for `OAuthPlatform.release`, `gate` that it waits for that event. `fields` replace those
    of a proper answer (None: left out).
    """

    answer: Answer = "proper"
    takes_effect: bool = False
    is_late: bool = False
    gate: asyncio.Event | None = None
    error: tuple[int, str] | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    retry_after: str = "120"


@dataclass(slots=True)
class Grant:
    """A merchant's consent: the refresh token that is good, and the one before while it is."""

    shop: str
    refresh_token: str
    retained: str | None = None
    access_tokens: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request for a token as it came in."""

    host: str
    refresh_token: str
    authorization: Literal["body", "basic", "none"]


class OAuthPlatform:
    """The stand-in; an asynchronous context manager that listens on a free port of loopback."""

    def __init__(
        self,
        *,
        client_id: str = "our-app",
        client_secret: str = "shpss_5fJ2k8Qx",
        retains: bool = True,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.client_id = client_id
        self.client_secret = client_secret
        self.retains = retains
        self.calls: list[Call] = []
        self.elsewhere = 0
        """Requests that came after a redirect."""
        self.secrets: set[str] = {client_secret}
        """Everything that must never be seen anywhere."""
        self.at_once = 0
        self.most_at_once = 0
        self._tls = tls
        self._port = port
        self._acts: deque[Act] = deque()
        self._grants: list[Grant] = []
        self._arrived = asyncio.Event()
        self._released = asyncio.Event()
        app = web.Application()
        app.router.add_post(PATH, self._token)
        app.router.add_route("*", ELSEWHERE, self._other)
        app.router.add_post("/stand-in/misbehave", self._told)
        app.router.add_post("/stand-in/grants", self._granted)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._tls)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def url(self) -> str:
        """Its token endpoint."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self._port}{PATH}"

    def grant(self, shop: str) -> dict[str, object]:
        """A merchant connects its shop: the token data of the first pair."""
        grant = Grant(shop=shop, refresh_token="")
        self._grants.append(grant)
        return self._issue(grant)

    def revoke(self, shop: str) -> None:
        """The merchant disconnects its shop."""
        self._grants = [grant for grant in self._grants if grant.shop != shop]

    def is_good(self, token_data: Mapping[str, object]) -> bool:
        """Whether the access token is the shop's newest, and the refresh token can be used."""
        return any(
            grant.access_tokens[-1] == token_data.get("access_token")
            and grant.refresh_token == token_data.get("refresh_token")
            for grant in self._grants
        )

    def misbehave(self, *acts: Act) -> None:
        """Treat the next requests so, one each; then all is well again."""
        self._acts.extend(acts)

    def hold(self, *, error: tuple[int, str] | None = None) -> asyncio.Event:
        """Answer the next request late: when the event that this returns is set."""
        gate = asyncio.Event()
        self._acts.append(Act(error=error, gate=gate))
        return gate

    def release(self) -> None:
        """Let go the answers that are late, now and from now on."""
        self._released.set()

    async def called(self, times: int) -> None:
        """Return when so many requests have come in."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.calls) < times:
                self._arrived.clear()
                await self._arrived.wait()

    # ---- the endpoint

    async def _token(self, request: web.Request) -> web.StreamResponse:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._treated(request)
        finally:
            self.at_once -= 1

    async def _treated(self, request: web.Request) -> web.StreamResponse:
        form = await request.post() if _is_form(request) else {}
        act = self._acts.popleft() if self._acts else Act()
        refresh_token = str(form.get("refresh_token", ""))
        client = self._client(request, form)
        self.calls.append(
            Call(host=request.host, refresh_token=refresh_token, authorization=client[0])
        )
        self._arrived.set()
        fields: dict[str, object] = {}
        refusal = act.error or self._refusal(form, client)
        if refusal is None and (act.answer == "proper" or act.takes_effect):
            fields, refusal = self._exchanged(refresh_token)
        if act.is_late:
            await self._released.wait()
        if act.gate is not None:
            await act.gate.wait()
        if act.answer != "proper":
            return self._misbehaving(request, act, fields)
        if refusal is not None:
            status, error = refusal
            said = {"error": error, "error_description": f"no {refresh_token}"}
            return web.json_response(said, status=status)
        changed = {**fields, **act.fields}
        kept = {name: value for name, value in changed.items() if value is not None}
        return web.Response(body=orjson.dumps(kept), content_type="application/json")

    def _client(
        self, request: web.Request, form: Mapping[str, object]
    ) -> tuple[Literal["body", "basic", "none"], str, str]:
        header = request.headers.get("Authorization", "")
        if header.startswith("Basic "):
            try:
                name, _, secret = base64.b64decode(header[6:]).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                return "basic", "", ""
            return "basic", unquote_plus(name), unquote_plus(secret)
        if "client_id" in form:
            return "body", str(form["client_id"]), str(form.get("client_secret", ""))
        return "none", "", ""

    def _refusal(
        self, form: Mapping[str, object], client: tuple[str, str, str]
    ) -> tuple[int, str] | None:
        """The errors of RFC 6749, 5.2, that come before the refresh token is looked at."""
        if client[1:] != (self.client_id, self.client_secret):
            return 401, "invalid_client"
        if "refresh_token" not in form:
            return 400, "invalid_request"
        if form.get("grant_type") != "refresh_token":
            return 400, "unsupported_grant_type"
        return None

    def _exchanged(self, refresh_token: str) -> tuple[dict[str, object], tuple[int, str] | None]:
        for grant in self._grants:
            if refresh_token == grant.refresh_token:
                grant.retained = refresh_token if self.retains else None
                return self._issue(grant), None
            if refresh_token == grant.retained:
                return self._issue(grant), None
        # As Shopify says it, and as the standard does.
        return {}, ((401, "invalid_request") if self.retains else (400, "invalid_grant"))

    def _issue(self, grant: Grant) -> dict[str, object]:
        access_token = f"shpat_{secrets.token_hex(16)}"
        grant.access_tokens.append(access_token)
        grant.refresh_token = f"shprt_{secrets.token_hex(16)}"
        self.secrets |= {access_token, grant.refresh_token}
        return {
            "access_token": access_token,
            "expires_in": LIFETIME_S,
            "refresh_token": grant.refresh_token,
            "refresh_token_expires_in": REFRESH_LIFETIME_S,
            "scope": SCOPES,
        }

    def _misbehaving(
        self, request: web.Request, act: Act, fields: Mapping[str, object]
    ) -> web.StreamResponse:
        # What an error page shows of the request must not come out anywhere.
        shown = f"{fields.get('access_token')} {self.client_secret}"
        page = _ERROR_PAGE.format(shown)
        as_json = "application/json"
        match act.answer:
            case "cut":
                assert request.transport is not None
                request.transport.abort()
                answer = web.Response()
            case "500" | "503":
                answer = web.Response(status=int(act.answer), text=page)
            case "error-page":
                answer = web.Response(text=page, content_type="text/html")
            case "429":
                answer = web.Response(status=429, headers={"Retry-After": act.retry_after})
            case "not-json":
                answer = web.Response(text=f"{{'access_token': {shown}", content_type=as_json)
            case "huge":
                answer = web.Response(body=b" " * HUGE_BYTES, content_type=as_json)
            case _:
                # A status that keeps the method: whoever follows it takes the form along.
                answer = web.Response(status=307, headers={"Location": ELSEWHERE})
        return answer

    async def _other(self, _request: web.Request) -> web.Response:
        self.elsewhere += 1
        return web.json_response({})

    # ---- for whoever runs it by hand

    async def _told(self, request: web.Request) -> web.Response:
        answer = request.query.get("answer", "proper")
        if answer not in get_args(Answer):
            return web.Response(status=400, text=f"answer: one of {', '.join(get_args(Answer))}\n")
        act = Act(
            answer=next(one for one in get_args(Answer) if one == answer),
            takes_effect="takes_effect" in request.query,
            is_late="is_late" in request.query,
        )
        self.misbehave(*[act] * min(int(request.query.get("times", "1")), 1000))
        return web.Response(text="so be it\n")

    async def _granted(self, request: web.Request) -> web.Response:
        return web.json_response(self.grant(request.query.get("shop", "by-hand.example")))


def _is_form(request: web.Request) -> bool:
    return request.content_type == "application/x-www-form-urlencoded"


async def _serve(port: int, *, retains: bool) -> None:
    async with OAuthPlatform(port=port, retains=retains) as platform:
        told = {
            "url": platform.url,
            "client_id": platform.client_id,
            "client_secret": platform.client_secret,
            "token_data": platform.grant("by-hand.example"),
        }
        sys.stdout.write(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode() + "\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().create_future()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A stand-in for a platform's token endpoint.")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument(
        "--forgets", action="store_true", help="drop a refresh token at its first use"
    )
    given = parser.parse_args()
    try:
        asyncio.run(_serve(given.port, retains=not given.forgets))
    except KeyboardInterrupt:
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
