"""Admin routes by which glamctl gives the daemon what older services kept of merchants' money.

A merchant's rows may take several requests: they are gathered here, in a file without a name where
they are many, and only when the last of them is here is the merchant imported, whole. What becomes
of it is decided by the importers.
"""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, Protocol, TypeAlias

import orjson
from pydantic import Field

from glamd.admin.services import Merchants, NewMerchants
from glamd.errors import ConflictError, FieldError, InputError, NotFoundError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route
from glamd.ids import as_uuid
from glamd.ledger.importing.merchant import OlderMerchant, OlderRow, Taken

PARTS_LIMIT: Final = 200
ROWS_LIMIT: Final = 1_000
HEADS_LIMIT: Final = 8
"""Merchants, or parts of them, in a request, and rows of one; two heads are one too many."""

AT_ONCE: Final = 3
"""Merchants that are imported at the same time, on as many connections of the daemon's pool."""

MEMORY_BYTES: Final = 8 * 1024 * 1024
HISTORY_LIMIT_BYTES: Final = 4 * 1024 * 1024 * 1024
"""What is gathered of one merchant: in memory, and at most."""

IMPORT_MOVED: Final = "IMPORT_MOVED"

Kind = Literal["credits", "billing"]
FieldName = Annotated[str, Field(max_length=64)]
FieldText = Annotated[str, Field(max_length=32_768)]
RowBody: TypeAlias = dict[FieldName, FieldText | None]


class PartBody(Body):
    """Some rows of a merchant, of all that follow one another from `begins` to `ends`."""

    merchant_id: Annotated[str, Field(max_length=64)]
    heads: Annotated[list[RowBody], Field(max_length=HEADS_LIMIT)]
    rows: Annotated[list[RowBody], Field(max_length=ROWS_LIMIT)]
    begins: bool
    ends: bool


class ImportBody(Body):
    """Parts in their order; `run` is one run of glamctl's, so that two of them are not mixed up."""

    run: Annotated[str, Field(min_length=1, max_length=64)]
    strict: bool = False
    dry_run: bool = False
    parts: Annotated[list[PartBody], Field(min_length=1, max_length=PARTS_LIMIT)]


class Importer(Protocol):
    """What takes a merchant that is whole."""

    async def take(
        self, merchant: OlderMerchant, *, strict: bool = ..., dry_run: bool = ...
    ) -> Taken:
        """Take it, all or nothing; raises UnavailableError."""


class ImportRoutes:
    """Handlers of the routes of the imports."""

    def __init__(
        self,
        *,
        credits: Importer,  # noqa: A002 - what it is about
        billing: Importer,
        merchants: Merchants,
        onboarding: NewMerchants,
    ) -> None:
        self._merchants = merchants
        self._onboarding = onboarding
        self._tables = {"credits": _Table(credits), "billing": _Table(billing)}

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("/v1/import/credits", self._credits),
            ("/v1/import/billing", self._billing),
        )
        return tuple(
            Route(method="POST", path=path, handler=handler, access=(OPERATOR,))
            for path, handler in found
        )

    def close(self) -> None:
        """Give up what was gathered of a merchant whose end never came."""
        for table in self._tables.values():
            table.drop()

    async def _credits(self, call: Call) -> Answer:
        return await self._take(call, "credits")

    async def _billing(self, call: Call) -> Answer:
        return await self._take(call, "billing")

    async def _take(self, call: Call, kind: Kind) -> Answer:
        body = await call.json(ImportBody)
        table = self._tables[kind]
        async with table.lock:
            whole: list[_Gathered] = []
            try:
                for part in body.parts:
                    gathered = table.gather(body.run, part)
                    whole += [] if gathered is None else [gathered]
                results = await self._all(table.importer, whole, body)
            finally:
                for gathered in whole:
                    gathered.close()
        return Answer(data={"results": results})

    async def _all(
        self, importer: Importer, whole: Sequence["_Gathered"], body: ImportBody
    ) -> list[dict[str, object]]:
        """Import these, several at once; where some fail the others are finished all the same."""
        room = asyncio.Semaphore(AT_ONCE)

        async def one(gathered: _Gathered) -> dict[str, object]:
            async with room:
                taken = await importer.take(
                    gathered.merchant(), strict=body.strict, dry_run=body.dry_run
                )
                is_here = taken.outcome not in ("refused", "moved_on") and not body.dry_run
                return _as_json(taken, await self._known(taken) if is_here else None)

        done = await asyncio.gather(*map(one, whole), return_exceptions=True)
        for found in done:
            if isinstance(found, BaseException):
                raise found
        return [found for found in done if not isinstance(found, BaseException)]

    async def _known(self, taken: Taken) -> dict[str, object] | None:
        """Make the merchant where its shop is told; None, or why there is no such merchant."""
        merchant_id, shop = as_uuid(taken.merchant_id), taken.shop
        assert merchant_id is not None, "it was taken"
        try:
            if shop is None:
                await self._merchants.show(merchant_id)
            else:
                await self._onboarding.create(
                    platform=shop.platform,
                    shop_id=shop.shop_id,
                    domain=shop.domain,
                    merchant_id=merchant_id,
                )
        except (NotFoundError, InputError, ConflictError) as error:
            return {"code": error.code, "fields": _fields(error.fields)}
        return None


class _Gathered:
    """What has come of a merchant so far."""

    def __init__(self, run: str, part: PartBody) -> None:
        self.run = run
        self.merchant_id = part.merchant_id
        self._heads = part.heads
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 - closed by `close`
        self._bytes = 0

    def add(self, rows: Sequence[OlderRow]) -> None:
        """Keep these as well. Raises InputError where it is too much."""
        if not rows:
            return
        line = orjson.dumps(rows) + b"\n"
        self._bytes += len(line)
        if self._bytes > HISTORY_LIMIT_BYTES:
            raise InputError(f"A merchant has more than {HISTORY_LIMIT_BYTES} bytes of rows.")
        self._file.write(line)

    def merchant(self) -> OlderMerchant:
        """The merchant, whole, for as long as this is open."""
        return OlderMerchant(merchant_id=self.merchant_id, heads=self._heads, chunks=self._chunks)

    def close(self) -> None:
        """Forget it."""
        self._file.close()

    def _chunks(self) -> Iterator[Sequence[OlderRow]]:
        self._file.seek(0)
        for line in self._file:
            yield orjson.loads(line)


class _Table:
    """An import's route: one merchant is gathered at a time."""

    def __init__(self, importer: Importer) -> None:
        self.importer = importer
        self.lock = asyncio.Lock()
        self._open: _Gathered | None = None

    def gather(self, run: str, part: PartBody) -> _Gathered | None:
        """Add a part; what was gathered, where that was the last one: it is the caller's then."""
        if part.begins:
            self.drop()
            self._open = _Gathered(run, part)
        gathered = self._open
        if gathered is None or (gathered.run, gathered.merchant_id) != (run, part.merchant_id):
            raise ConflictError(
                "The beginning of this merchant is not here: is there a second import, or did the"
                " daemon start anew? Give the command again.",
                code=IMPORT_MOVED,
            )
        gathered.add(part.rows)
        if not part.ends:
            return None
        self._open = None
        return gathered

    def drop(self) -> None:
        """Forget what was gathered."""
        if self._open is not None:
            self._open.close()
            self._open = None


def _fields(fields: Sequence[FieldError]) -> list[dict[str, str]]:
    return [{"field": one.field, "message": one.message} for one in fields]


def _as_json(taken: Taken, not_known: dict[str, object] | None) -> dict[str, object]:
    return {
        "merchant_id": taken.merchant_id,
        "outcome": taken.outcome,
        "figures": dict(taken.figures),
        "notes": dict(taken.notes),
        "refused": [
            {"table": one.table, "id": one.id, "field": one.field, "message": one.message}
            for one in taken.refused
        ],
        "merchant": not_known,
    }
