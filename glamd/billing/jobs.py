"""What happens to billing by itself: trials and purchases end, webhooks take effect, platforms are
asked.

Any number of nodes run these jobs at once. Each takes what nobody else has taken, in bounded
batches, and what must happen once is a condition of the statement that does it. Nothing here knows
what a job does; no job's trouble is another one's.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import structlog
from prometheus_client import Counter

from glamd.batches import in_rounds
from glamd.billing import store
from glamd.billing.model import TRIAL_EXPIRED
from glamd.billing.reconciliation import BATCH as RECONCILIATION_BATCH
from glamd.billing.reconciliation import Reconciliation
from glamd.billing.webhooks.service import BATCH as WEBHOOK_BATCH
from glamd.billing.webhooks.service import Webhooks
from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import TransientError
from glamd.outbox import Outbox

EXPIRY_BATCH: Final = 100
EXPIRY_BATCHES: Final = 10_000
"""How many batches `expire_now` does at most; the job does the rest."""

PURGE_EVERY_S: Final = 3600.0
TROUBLE_PAUSE_MIN_S: Final = 0.5
TROUBLE_PAUSE_MAX_S: Final = 30.0
"""The pause after a failure, doubled each time, and the longest."""

log = structlog.get_logger()

_EXPIRED: Final = Counter("glamd_billing_expired_total", "Ended by their time.", ["what"])
_TROUBLE: Final = Counter("glamd_billing_job_failures_total", "Rounds that failed.", ["job"])


@dataclass(frozen=True, slots=True)
class Expired:
    """How many trials and purchases have just ended by their time."""

    trials: int
    purchases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A round that is repeated every `interval_s`, at once where it did `full`, or when `woken`."""

    name: str
    round: Callable[[], Awaitable[int]]
    full: int
    interval_s: float
    woken: asyncio.Event | None = None


class BillingJobs:
    """The jobs of this node.

    The intervals are how often each looks for something to do; webhooks that this node has taken do
    not wait for theirs.
    """

    def __init__(
        self,
        database: Database,
        *,
        webhooks: Webhooks,
        reconciliation: Reconciliation,
        clock: Clock,
        expiry_interval_s: float = 30.0,
        reconciliation_interval_s: float = 10.0,
        webhook_interval_s: float = 1.0,
    ) -> None:
        self._database = database
        self._clock = clock
        self._outbox = Outbox("glam")
        self._jobs = (
            _Job(
                name="trial_expiry",
                round=self._expire_trials,
                full=EXPIRY_BATCH,
                interval_s=expiry_interval_s,
            ),
            _Job(
                name="purchase_expiry",
                round=self._expire_purchases,
                full=EXPIRY_BATCH,
                interval_s=expiry_interval_s,
            ),
            _Job(
                name="webhooks",
                round=webhooks.apply_due,
                full=WEBHOOK_BATCH,
                interval_s=webhook_interval_s,
                woken=webhooks.arrived,
            ),
            _Job(
                name="reconciliation",
                round=reconciliation.run_once,
                full=RECONCILIATION_BATCH,
                interval_s=reconciliation_interval_s,
            ),
            _Job(name="webhook_purge", round=webhooks.purge, full=1, interval_s=PURGE_EVERY_S),
        )

    async def run(self) -> None:
        """Do all of it until cancelled. What a cancelled round had begun is begun again later."""
        async with asyncio.TaskGroup() as group:
            for job in self._jobs:
                group.create_task(self._serve(job), name=f"billing:{job.name}")

    async def expire_now(self) -> Expired:
        """End what is over by now, without waiting for the jobs. Raises UnavailableError."""
        trials = await in_rounds(self._expire_trials, full=EXPIRY_BATCH, most=EXPIRY_BATCHES)
        purchases = await in_rounds(self._expire_purchases, full=EXPIRY_BATCH, most=EXPIRY_BATCHES)
        return Expired(trials, purchases)

    async def _serve(self, job: _Job) -> None:
        trouble_s = TROUBLE_PAUSE_MIN_S
        while True:
            if job.woken is not None:
                job.woken.clear()  # before the look, so that nothing comes unseen after it
            try:
                done = await job.round()
            except TransientError as error:
                _TROUBLE.labels(job.name).inc()
                log.warning("billing_job_blind", job=job.name, code=error.code)
            except Exception:
                # A bug in one round must not end the job for good.
                _TROUBLE.labels(job.name).inc()
                log.exception("billing_job_crashed", job=job.name)
            else:
                trouble_s = TROUBLE_PAUSE_MIN_S
                if done < job.full:
                    await _pause(job.interval_s, job.woken)
                continue
            await asyncio.sleep(trouble_s)
            trouble_s = min(2 * trouble_s, TROUBLE_PAUSE_MAX_S)

    async def _expire_trials(self) -> int:
        """End trials that are over, each with its one event; at most EXPIRY_BATCH."""
        async with self._database.transaction() as connection:
            ended = await store.expire_trials(connection, now=self._clock.now(), limit=EXPIRY_BATCH)
            for merchant_id, ends_at in ended:
                await self._outbox.add(
                    connection,
                    subject=TRIAL_EXPIRED,
                    merchant_id=merchant_id,
                    correlation_id=f"trial-expiry-{uuid4()}",
                    data={"merchant_id": str(merchant_id), "expired_at": ends_at.isoformat()},
                )
        for merchant_id, _ in ended:
            log.info("trial_expired", merchant_id=str(merchant_id))
        _EXPIRED.labels("trial").inc(len(ended))
        return len(ended)

    async def _expire_purchases(self) -> int:
        """End purchases that were not paid in time; at most EXPIRY_BATCH."""
        ended = await store.expire(self._database, now=self._clock.now(), limit=EXPIRY_BATCH)
        for purchase_id in ended:
            log.info("purchase_expired", purchase_id=str(purchase_id))
        _EXPIRED.labels("purchase").inc(len(ended))
        return len(ended)


async def _pause(seconds: float, woken: asyncio.Event | None) -> None:
    if woken is None:
        await asyncio.sleep(seconds)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await woken.wait()
