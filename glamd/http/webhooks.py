"""`/webhooks/…`: what platforms tell of charges. Public routes, whose signatures billing checks.

The raw body goes on as it came, since its bytes are what is signed. Stored first, answered then;
what a webhook says takes effect afterwards and elsewhere.
"""

from collections.abc import Callable
from typing import Final, Literal

from typing_extensions import TypedDict

from glamd.billing.webhooks.service import Webhooks
from glamd.errors import RateLimitedError, UnavailableError
from glamd.http.bodies import read_body
from glamd.http.call import Answer, Call
from glamd.http.limits import RateLimiter
from glamd.http.operation import Operation, Refusal
from glamd.http.routes import Route

DRAIN_RETRY_AFTER_S: Final = 5

Sender = Literal["shopify", "custom"]


class WebhookTaken(TypedDict):
    """That a webhook is stored; a repeated one is stored once."""

    status: Literal["stored"]


class WebhookRoutes:
    """Handlers of the webhook routes on the api listener."""

    def __init__(
        self,
        webhooks: Webhooks,
        *,
        limiter: RateLimiter | None,
        draining: Callable[[], bool],
    ) -> None:
        """`limiter` holds each address to its rate, in buckets of their own: whoever guesses at
        tokens from the same address does not keep a platform's webhooks out.
        """
        self._webhooks = webhooks
        self._limiter = limiter
        self._draining = draining

    def routes(self) -> tuple[Route, ...]:
        """The table's entries; nobody is asked who they are but by the signature."""
        return (
            Route(
                method="POST",
                path="/webhooks/shopify",
                handler=self._shopify,
                access=(),
                operation=_SHOPIFY,
            ),
            Route(
                method="POST",
                path="/webhooks/custom",
                handler=self._custom,
                access=(),
                operation=_CUSTOM,
            ),
        )

    async def _shopify(self, call: Call) -> Answer:
        return await self._take(call, "shopify")

    async def _custom(self, call: Call) -> Answer:
        return await self._take(call, "custom")

    async def _take(self, call: Call, sender: Sender) -> Answer:
        # The pipeline asks public routes neither of these two.
        if self._draining():
            raise UnavailableError(
                "The daemon is stopping; ask another one.", retry_after_s=DRAIN_RETRY_AFTER_S
            )
        wait_s = 0 if self._limiter is None else self._limiter.take(f"webhook:{call.ip}")
        if wait_s:
            raise RateLimitedError("Too many requests.", retry_after_s=wait_s)
        body = await read_body(call.request, call.limits)
        await self._webhooks.take(sender, body, call.request.headers)
        data: WebhookTaken = {"status": "stored"}
        return Answer(data=data)


_TAG: Final = "Webhooks"
_REFUSALS: Final = (
    Refusal(
        code="UNAUTHENTICATED",
        status=401,
        when="The signature is missing, wrong or too old; nothing is stored.",
    ),
    Refusal(code="NOT_FOUND", status=404, when="This platform is not configured."),
    Refusal(
        code="RATE_LIMITED",
        status=429,
        when="Too many come from this address; `Retry-After` says how many seconds to wait.",
    ),
)
_SHOPIFY: Final = Operation(
    id="takeShopifyWebhook",
    tag=_TAG,
    summary="A webhook of Shopify's",
    description="Any body, signed in `X-Shopify-Hmac-Sha256` with the app's current or previous "
    "secret. It is stored before it is answered; a delivery that is repeated "
    "(`X-Shopify-Webhook-Id`) is stored once.",
    answer=WebhookTaken,
    example={"status": "stored"},
    refusals=_REFUSALS,
)
_CUSTOM: Final = Operation(
    id="takeCustomWebhook",
    tag=_TAG,
    summary="A callback of a payment page of one's own",
    description="JSON, signed in `X-Glamd-Signature` over `X-Glamd-Timestamp`, `X-Glamd-Nonce` and "
    "the body. It is stored before it is answered, once for each nonce.",
    answer=WebhookTaken,
    example={"status": "stored"},
    refusals=_REFUSALS,
)
