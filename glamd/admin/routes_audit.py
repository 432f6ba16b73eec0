"""Admin routes about the audit log. No card data is in it, and no rule of the chain here."""

import re
from collections.abc import Sequence
from datetime import date, datetime
from typing import Annotated, Final, Protocol

from pydantic import Field

from glamd.admin.query import wrong
from glamd.errors import ConflictError, InternalError, NotFoundError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.queries import Query
from glamd.http.routes import OPERATOR, Route
from glamd.payments.audit import AuditReport
from glamd.payments.audit_chain import Head
from glamd.payments.auditing.heads import SignedHead
from glamd.payments.auditing.reading import Page, Sought
from glamd.payments.auditing.store import Dropped, Rights

PAGE_LIMIT: Final = 1000
"""Rows of one answer, some 600 KiB: exports and what is followed come page by page."""

HEADS_LIMIT: Final = 500
"""Heads of one question, some 150 KiB."""

_MONTH: Final = r"[1-9][0-9]{3}-(?:0[1-9]|1[0-2])"
_PLACE = re.compile(rf"({_MONTH}):([0-9]{{1,18}})")
_HEAD = re.compile(rf"({_MONTH})(?:-01)?:([1-9][0-9]{{0,17}}):([0-9A-Fa-f]{{64}})")

_WHY_NOT: Final[dict[Dropped, str]] = {
    "too-young": "It is not older than seven years.",
    "not-the-oldest": "An earlier month is still there.",
    "the-newest": "The chain ends in this month.",
}

Mac = Annotated[str, Field(pattern="^[0-9A-Fa-f]{64}$")]


class AuditLog(Protocol):
    """The audit log and its chain."""

    @property
    def months_ahead(self) -> int:
        """How many months after this one have their partition."""

    async def verify(self, *, head: Head | None = None, since: date | None = None) -> AuditReport:
        """Walk the chain; it must hold the row of `head`, an end that was logged earlier."""

    async def head(self) -> SignedHead | None:
        """Where the chain ends, signed."""

    async def faults_of(self, heads: Sequence[SignedHead]) -> list[tuple[int, str]]:
        """Which of these the chain does not hold, by their place, and why."""

    async def after(
        self, position: tuple[date, int] | None, *, limit: int, sought: Sought | None = None
    ) -> Page:
        """The rows after one."""

    async def newest(self, count: int, *, sought: Sought | None = None) -> Page:
        """The last rows."""

    async def drop_month(self, month: date, *, actor: str) -> Dropped:
        """Drop the oldest month."""

    async def rights(self) -> Rights:
        """What our database role may do to the log."""


class WalkQuery(Query):
    """Where a walk begins, and what it has to pass."""

    since: Annotated[str, Field(pattern=f"^{_MONTH}$")] | None = None
    head: str | None = None


class RowsQuery(Query):
    """Which rows; `after` is the `next` of the page before."""

    limit: Annotated[int, Field(ge=1, le=PAGE_LIMIT)] = 100
    after: str | None = None
    worker: Annotated[str, Field(max_length=512)] | None = None
    subject: Annotated[str, Field(max_length=512)] | None = None
    outcome: Annotated[str, Field(max_length=512)] | None = None

    @property
    def sought(self) -> Sought | None:
        """What of each row is asked for."""
        if self.worker is None and self.subject is None and self.outcome is None:
            return None
        return Sought(actor=self.worker, subject=self.subject, outcome=self.outcome)


class HeadBody(Body):
    """A line of a file of heads."""

    at: datetime
    month: Annotated[str, Field(pattern=f"^{_MONTH}$")]
    seq: Annotated[int, Field(ge=1, lt=10**18)]
    mac: Mac
    key_version: Annotated[str, Field(max_length=64)]
    signature: Mac


class HeadsBody(Body):
    """Heads to hold the chain against."""

    heads: Annotated[list[HeadBody], Field(min_length=1, max_length=HEADS_LIMIT)]


class AuditRoutes:
    """Handlers of the routes about the audit."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("POST", "/v1/audit/verify", self._verify),
            ("POST", "/v1/audit/heads", self._heads),
            ("GET", "/v1/audit/head", self._head),
            ("GET", "/v1/audit/status", self._status),
            ("GET", "/v1/audit/rows", self._rows),
            ("GET", "/v1/audit/tail", self._tail),
            ("POST", "/v1/audit/months/{month}/drop", self._drop),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _verify(self, call: Call) -> Answer:
        query = call.query(WalkQuery)
        since = None if query.since is None else _first_day(query.since)
        head = None if query.head is None else _logged_head(query.head)
        if head is not None and since is not None and head.month < since:
            raise wrong("head", "It is of a month that --since leaves out.")
        return Answer(data=_report(await self._audit.verify(head=head, since=since)))

    async def _heads(self, call: Call) -> Answer:
        body = await call.json(HeadsBody)
        faults = await self._audit.faults_of([_signed(head) for head in body.heads])
        data = [{"index": index, "reason": reason} for index, reason in faults]
        return Answer(data={"checked": len(body.heads), "faults": data})

    async def _head(self, _call: Call) -> Answer:
        try:
            head = await self._audit.head()
        except InternalError as error:
            why = "The head of the audit chain does not verify; `glamctl audit verify` says more."
            raise ConflictError(why, code="AUDIT_DAMAGED") from error
        if head is None:
            raise NotFoundError("The audit log has no row yet.", code="AUDIT_EMPTY")
        return Answer(data=head.as_json())

    async def _status(self, _call: Call) -> Answer:
        rights = await self._audit.rights()
        head, verifies = None, True
        try:
            head = await self._audit.head()
        except InternalError:
            # Just then somebody wants to see the rest.
            verifies = False
        data = {
            "append_only": rights.append_only,
            "role": rights.role,
            "login": rights.login,
            "login_owns_the_log": rights.login_owns,
            "months_ahead": self._audit.months_ahead,
            "head_verifies": verifies,
            "head": None if head is None else head.as_json(),
        }
        return Answer(data=data)

    async def _rows(self, call: Call) -> Answer:
        query = call.query(RowsQuery)
        page = await self._audit.after(_place(query.after), limit=query.limit, sought=query.sought)
        return Answer(data=_page(page))

    async def _tail(self, call: Call) -> Answer:
        query = call.query(RowsQuery)
        return Answer(data=_page(await self._audit.newest(query.limit, sought=query.sought)))

    async def _drop(self, call: Call) -> Answer:
        month = call.params["month"]
        if not re.fullmatch(_MONTH, month):
            raise wrong("month", "It is a month such as 2019-01.")
        actor = call.operator.name
        dropped = await self._audit.drop_month(_first_day(month), actor=actor)
        if dropped == "not-there":
            raise NotFoundError("There is no such month.", code="MONTH_NOT_FOUND")
        if dropped != "dropped":
            raise ConflictError(_WHY_NOT[dropped])
        return Answer(data={"month": month, "dropped": True})


def _first_day(month: str) -> date:
    return date.fromisoformat(f"{month}-01")


def _place(text: str | None) -> tuple[date, int] | None:
    if text is None:
        return None
    found = _PLACE.fullmatch(text)
    if found is None:
        raise wrong("after", "It is a MONTH:SEQ, such as 2026-11:52.")
    month, seq = found.groups()
    return _first_day(month), int(seq)


def _signed(head: HeadBody) -> SignedHead:
    return SignedHead(
        at=head.at,
        month=_first_day(head.month),
        seq=head.seq,
        mac=bytes.fromhex(head.mac),
        key_version=head.key_version,
        signature=bytes.fromhex(head.signature),
    )


def _logged_head(text: str) -> Head:
    """The end of the chain as `audit_head` was logged."""
    found = _HEAD.fullmatch(text)
    if found is None:
        raise wrong("head", "It is one MONTH:SEQ:MAC, as in the log's audit_head.")
    month, seq, mac = found.groups()
    return Head(_first_day(month), int(seq), bytes.fromhex(mac))


def _page(page: Page) -> dict[str, object]:
    place = page.position
    following = None if place is None else f"{place[0]:%Y-%m}:{place[1]}"
    return {"rows": page.rows, "next": following, "more": page.more}


def _report(report: AuditReport) -> dict[str, object]:
    broken = report.first_broken
    return {
        "ok": report.ok,
        "rows": report.rows,
        "partitions": report.partitions,
        "first_broken": None
        if broken is None
        else {
            "partition": f"{broken.month:%Y-%m}",
            "seq": broken.seq,
            "reason": str(broken.reason),
            "detail": broken.detail,
        },
    }
