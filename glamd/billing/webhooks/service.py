"""Taking webhooks, and giving them their effect.

A platform waits a few seconds for an answer and gives up on those who are slow, so a webhook is
kept and answered, and what it says is seen to afterwards. One that comes before its charge's id is
stored waits for it. A platform repeats, reorders and loses webhooks; none of that may show in the
money.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

import structlog
from prometheus_client import Counter

from glamd.billing.model import Outcome, Report
from glamd.billing.platforms.interface import Platform
from glamd.billing.settlement import Settlement
from glamd.billing.webhooks import store
from glamd.billing.webhooks.store import Waiting
from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.errors import (
    GlamError,
    InputError,
    InternalError,
    NotFoundError,
    TransientError,
    UnauthenticatedError,
)

BODY_LIMIT_BYTES: Final = 256 * 1024
BATCH: Final = 50
ATTEMPTS_LIMIT: Final = 20
"""A webhook waits an hour and three quarters for what it is about; that a purchase has this charge
is found within minutes."""

KEPT_FOR: Final = timedelta(days=90)
"""After this a webhook that is done with is deleted. One that comes again changes nothing even
then, since it is the purchase's state that decides."""

PURGE_ROWS: Final = 1000

log = structlog.get_logger()

_TAKEN: Final = Counter(
    "glamd_billing_webhooks_total", "Webhooks that came in.", ["platform", "outcome"]
)
_DONE: Final = Counter(
    "glamd_billing_webhooks_done_total", "What has come of webhooks.", ["platform", "outcome"]
)


class Webhooks:
    """The webhooks of the platforms that are configured, each kept for `kept_for`."""

    def __init__(
        self,
        database: Database,
        *,
        settlement: Settlement,
        platforms: Sequence[Platform],
        clock: Clock,
        kept_for: timedelta = KEPT_FOR,
    ) -> None:
        self._database = database
        self._settlement = settlement
        self._platforms: dict[str, Platform] = {one.name: one for one in platforms}
        self._clock = clock
        self._kept_for = kept_for
        self.arrived = asyncio.Event()
        """Set when there is something to do."""

    async def take(self, platform: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Keep a webhook with its raw body; when this returns it may be answered with 200.

        A repeated delivery is kept once. Raises NotFoundError where the platform is not configured,
        UnauthenticatedError, InputError `BODY_TOO_LARGE`, UnavailableError.
        """
        sender = self._platforms.get(platform)
        if sender is None:
            raise NotFoundError("There is nothing here.")
        if len(body) > BODY_LIMIT_BYTES:
            raise InputError("The body is too large.", code="BODY_TOO_LARGE")
        now = self._clock.now()
        try:
            delivery = sender.receive(
                body, {name.lower(): value for name, value in headers.items()}, now
            )
        except UnauthenticatedError:
            _TAKEN.labels(platform, "refused").inc()
            raise
        concerns = sender.concerns(delivery.topic)
        kept = await store.keep(
            self._database,
            platform,
            delivery,
            # What we have no use for may be about people, and is none of our business.
            body if concerns else b"",
            now=now,
            outcome=None if concerns else "ignored",
        )
        outcome = "repeated" if not kept else "kept" if concerns else "ignored"
        _TAKEN.labels(platform, outcome).inc()
        log.info(
            "webhook_taken",
            platform=platform,
            outcome=outcome,
            topic=delivery.topic,
            delivery_id=delivery.delivery_id,
        )
        if kept and concerns:
            self.arrived.set()

    async def apply_due(self) -> int:
        """Give up to BATCH webhooks that are due their effect; how many. Raises TransientError."""
        due = await store.claim(
            self._database, now=self._clock.now(), platforms=list(self._platforms), limit=BATCH
        )
        for webhook in due:
            await self._apply(webhook)
        return len(due)

    async def purge(self) -> int:
        """Delete up to PURGE_ROWS webhooks that are done with and old enough; how many."""
        before = self._clock.now() - self._kept_for
        return await store.purge(self._database, before=before, limit=PURGE_ROWS)

    async def _apply(self, webhook: Waiting) -> None:
        """Give one its effect, or leave it to wait; TransientError where the database is away."""
        report = None
        try:
            report = self._platforms[webhook.platform].read(webhook.delivery, webhook.body)
            await self._settle(webhook, report)
        except InternalError as error:
            # It is in this one, not in the database, and the others must not wait for it.
            await self._left(webhook, report, error.code.lower())
        except TransientError:
            raise
        except NotFoundError as error:
            await self._left(webhook, report, error.code.lower())
        except GlamError as error:
            # Unreadable, or credits that were granted otherwise: waiting does not mend it.
            await self._finish(webhook, report, error.code.lower())
        except Exception:
            log.exception("webhook_crashed", webhook_id=webhook.id, platform=webhook.platform)
            await self._left(webhook, report, "crashed")

    async def _settle(self, webhook: Waiting, report: Report) -> None:
        async def and_then(connection: Connection, outcome: Outcome) -> None:
            await store.finish(connection, webhook.id, outcome=outcome, now=self._clock.now())

        outcome = await self._settlement.settle_charge(
            report,
            (self._platforms[webhook.platform].name,),
            source="webhook",
            correlation_id=webhook.delivery.delivery_id,
            and_then=and_then,
        )
        _DONE.labels(webhook.platform, outcome).inc()

    async def _left(self, webhook: Waiting, report: Report | None, outcome: str) -> None:
        """Let it be tried again, unless that was often enough."""
        if webhook.attempts >= ATTEMPTS_LIMIT:
            await self._finish(webhook, report, outcome)

    async def _finish(self, webhook: Waiting, report: Report | None, outcome: str) -> None:
        await store.finish(self._database, webhook.id, outcome=outcome, now=self._clock.now())
        _DONE.labels(webhook.platform, outcome).inc()
        # Where somebody may have paid and got nothing, that is for a human to find out.
        write = log.error if report is not None and report.is_paid else log.warning
        write(
            "webhook_given_up",
            webhook_id=webhook.id,
            platform=webhook.platform,
            outcome=outcome,
            delivery_id=webhook.delivery.delivery_id,
        )
