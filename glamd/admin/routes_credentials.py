"""Admin routes about platform tokens: how connections are, who touched them, and the import.

No secret goes out here. What comes in sealed by the older service goes to the importer as it is.
"""

import re
from datetime import datetime, timedelta
from typing import Annotated
from uuid import UUID

from pydantic import Field

from glamd.admin.query import DEFAULT_LIMIT, MAX_LIMIT, merchant_in_path, wrong
from glamd.admin.services import Credentials, OlderTokens
from glamd.clock import Clock
from glamd.credentials.importing.older import SEALED_LIMIT
from glamd.credentials.importing.service import (
    BATCH_LIMIT,
    HOLD_H,
    HOLD_LIMIT_H,
    POSITION_LIMIT,
    SOURCE_LIMIT,
    OlderBatch,
    Progress,
)
from glamd.credentials.model import (
    PLATFORMS,
    Access,
    Accessor,
    Health,
    Platform,
    ShopConnection,
)
from glamd.errors import NotFoundError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.queries import Query
from glamd.http.routes import OPERATOR, Route

Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
FieldName = Annotated[str, Field(max_length=64)]
FieldText = Annotated[str, Field(max_length=SEALED_LIMIT + 1)]

_AFTER = re.compile(r"([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}):([a-z]{1,32})")


class ConnectionsQuery(Query):
    """Which connections to list; `after` is `MERCHANT:PLATFORM`, the `next` of the page before."""

    merchant_id: UUID | None = None
    platform: Platform | None = None
    health: Health | None = None
    limit: Limit = DEFAULT_LIMIT
    after: str | None = None


class AccessQuery(Query):
    """Which rows of the access log to list; `before` is the `next` of the page before."""

    limit: Limit = DEFAULT_LIMIT
    before: Annotated[int, Field(ge=1, lt=2**63)] | None = None


class BatchBody(Body):
    """A batch of older rows; each value is text or null, and what is wrong with it is answered.

    `source` is a fingerprint of where they come from, `hold_renewal_h` hours.
    """

    rows: Annotated[
        list[dict[FieldName, FieldText | None]], Field(min_length=1, max_length=BATCH_LIMIT)
    ]
    after: Annotated[str, Field(max_length=POSITION_LIMIT)] | None = None
    source: Annotated[str, Field(max_length=SOURCE_LIMIT)] = ""
    hold_renewal_h: Annotated[int, Field(ge=0, le=HOLD_LIMIT_H)] = HOLD_H
    restart: bool = False
    dry_run: bool = False


class CredentialRoutes:
    """Handlers of the routes about platform tokens."""

    def __init__(self, credentials: Credentials, *, importer: OlderTokens, clock: Clock) -> None:
        self._credentials = credentials
        self._importer = importer
        self._clock = clock

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        of_merchant = "/v1/credentials/{merchant_id}"
        found = (
            ("GET", "/v1/credentials", self._list),
            ("GET", "/v1/credentials/import", self._progress),
            ("POST", "/v1/credentials/import", self._take),
            ("GET", of_merchant, self._of_merchant),
            ("GET", f"{of_merchant}/access-log", self._access_log),
            ("GET", f"{of_merchant}/{{platform}}", self._show),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _list(self, call: Call) -> Answer:
        query = call.query(ConnectionsQuery)
        found = await self._credentials.connections(
            merchant_id=query.merchant_id,
            platform=query.platform,
            health=query.health,
            limit=query.limit,
            after=_place(query.after),
        )
        full = len(found) == query.limit
        following = f"{found[-1].merchant_id}:{found[-1].platform}" if full else None
        return Answer(data={"connections": self._all_as_json(found), "next": following})

    async def _of_merchant(self, call: Call) -> Answer:
        merchant_id = merchant_in_path(call)
        found = await self._credentials.connections(merchant_id=merchant_id, limit=len(PLATFORMS))
        if not found:
            raise _unknown()
        return Answer(data={"merchant_id": merchant_id, "connections": self._all_as_json(found)})

    async def _show(self, call: Call) -> Answer:
        merchant_id = merchant_in_path(call)
        platform = next((p for p in PLATFORMS if p == call.params["platform"]), None)
        if platform is None:
            raise _unknown()
        found = await self._credentials.connection(merchant_id, platform)
        return Answer(data=_as_json(found, self._clock.now()))

    async def _access_log(self, call: Call) -> Answer:
        query = call.query(AccessQuery)
        found = await self._credentials.access_log(
            merchant_in_path(call), limit=query.limit, before=query.before
        )
        following = found[-1].access_id if len(found) == query.limit else None
        return Answer(data={"accesses": [_access(access) for access in found], "next": following})

    async def _progress(self, _call: Call) -> Answer:
        return Answer(data=_came_to(await self._importer.progress()))

    async def _take(self, call: Call) -> Answer:
        body = await call.json(BatchBody)
        batch = OlderBatch(
            rows=body.rows,
            after=body.after,
            source=body.source,
            hold_renewal=timedelta(hours=body.hold_renewal_h),
            restart=body.restart,
            dry_run=body.dry_run,
        )
        accessor = Accessor(
            kind=call.operator.kind,
            name=call.operator.name,
            ip=call.ip,
            request_id=call.request_id,
            correlation_id=call.correlation_id,
        )
        return Answer(data=_came_to(await self._importer.take(batch, accessor=accessor)))

    def _all_as_json(self, connections: tuple[ShopConnection, ...]) -> list[dict[str, object]]:
        now = self._clock.now()
        return [_as_json(connection, now) for connection in connections]


def _place(after: str | None) -> tuple[UUID, Platform] | None:
    """The connection that a page comes after. Raises `InputError`."""
    if after is None:
        return None
    found = _AFTER.fullmatch(after)
    platform = next((p for p in PLATFORMS if found is not None and p == found[2]), None)
    if found is None or platform is None:
        raise wrong("after", "It is MERCHANT:PLATFORM, as `next` of the page before.")
    return UUID(found[1]), platform


def _unknown() -> NotFoundError:
    return NotFoundError("There is no such platform token.", code="PLATFORM_TOKEN_NOT_FOUND")


def _as_json(connection: ShopConnection, now: datetime) -> dict[str, object]:
    """A connection; before `refresh_not_before` no further refresh is tried."""
    return {
        "merchant_id": connection.merchant_id,
        "platform": connection.platform,
        "health": connection.health(now),
        "platform_shop_id": connection.platform_shop_id,
        "domain": connection.domain,
        "token_id": connection.token_id,
        "token_type": connection.token_type,
        "scopes": list(connection.scopes),
        "expires_at": connection.expires_at,
        "is_expired": connection.is_expired(now),
        "key_version": connection.key_version,
        "refreshable": connection.refreshable,
        "refreshed_at": connection.refreshed_at,
        "refresh_failures": connection.refresh_failures,
        "refresh_error": connection.refresh_error,
        "refresh_not_before": connection.refresh_not_before,
        "generation": connection.generation,
        "created_at": connection.created_at,
        "updated_at": connection.updated_at,
        "access_count": connection.access_count,
        "last_accessed_by": connection.last_accessed_by,
        "last_accessed_at": connection.last_accessed_at,
    }


def _access(access: Access) -> dict[str, object]:
    return {
        "id": access.access_id,
        "at": access.at,
        "platform": access.platform,
        "token_id": access.token_id,
        "action": access.action,
        "success": access.error is None,
        "error": access.error,
        "kind": access.accessor.kind,
        "by": access.accessor.name,
        "ip": access.accessor.ip,
        "request_id": access.accessor.request_id,
        "correlation_id": access.accessor.correlation_id,
    }


def _came_to(progress: Progress) -> dict[str, object]:
    return {
        "source": progress.source,
        "position": progress.position,
        "counts": dict(progress.counts),
        "batch": dict(progress.batch),
        "refused": [
            {
                "id": refused.id,
                "code": refused.code,
                "message": refused.message,
                "fields": [
                    {"field": field.field, "message": field.message} for field in refused.fields
                ],
            }
            for refused in progress.refused
        ],
    }
