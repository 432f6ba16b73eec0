"""`Idempotency-Key`: which requests carry one, what they answer, and what is kept of the answer.

The rows are `glamd.idempotency`'s; a capability writes its answer through the `Keep` that it is
handed, in the transaction of the effect. Kept are successes, and errors that the same request would
always get; what may go better next time gives its key back. Only status and content are kept: the
ids and the time of an answer are those of the request that it answers.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, TypeGuard, TypeVar
from urllib.parse import quote

import orjson
import structlog
from pydantic import Field

from glamd.db import Connection
from glamd.errors import FieldError, GlamError, InputError, TransientError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.problems import RepeatedError, status_of
from glamd.idempotency import Claim, IdempotencyKeys, InProgressError, Keep, Remembered

log = structlog.get_logger()

R = TypeVar("R")

HEADER: Final = "Idempotency-Key"
BODY_FIELD: Final = "idempotency_key"
REPLAYED: Final = {"Idempotent-Replayed": "true"}
MAX_KEY_CHARS: Final = 255
END_TIMEOUT_S: Final = 3.0
"""How long a request that failed may take to say so in its key's row, before it answers."""

IdempotencyKey = Annotated[
    str, Field(min_length=1, max_length=MAX_KEY_CHARS, pattern=r"^[\x21-\x7e]+$")
]
"""The type of a model's field `idempotency_key`, the alias of the header."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class Once:
    """Runs the work of a request at most once for each idempotency key of its caller."""

    def __init__(self, keys: IdempotencyKeys) -> None:
        self._keys = keys

    async def __call__(
        self,
        call: Call,
        *,
        body: Body | None,
        work: Callable[[Keep[R] | None], Awaitable[R]],
        answer: Callable[[R], Answer],
    ) -> Answer:
        """The answer of `work`, or the one that it gave to this key before.

        Without a key, `work(None)` just runs; with one, it awaits the `Keep` that it gets, in the
        transaction of its effect. `call.json` has read the body by now. Raises `InputError` (also
        `IDEMPOTENCY_KEY_REUSED`), `InProgressError`, `UnavailableError`, and what `work` raises.
        """
        key = key_of(call, body)
        if key is None:
            return answer(await work(None))
        found = await self._keys.claim(scope=_scope(call), key=key, content=_canonical(call.raw))
        if isinstance(found, Remembered):
            return _again(found)
        return await self._first(found, work, answer)

    async def _first(
        self,
        claim: Claim,
        work: Callable[[Keep[R] | None], Awaitable[R]],
        answer: Callable[[R], Answer],
    ) -> Answer:
        kept = False

        async def keep(connection: Connection, result: R) -> None:
            nonlocal kept
            made = answer(result)
            # As text: the database's own JSON would come back with its names in another order.
            data = orjson.dumps(made.data, option=orjson.OPT_UTC_Z).decode()
            await self._keys.answer(
                claim, status=made.status, answer={"data": data}, connection=connection
            )
            kept = True

        try:
            result = await work(keep)
            assert kept, "the work ended well and did not keep its answer"
        except BaseException as error:
            await self._ended(claim, error)
            raise
        return answer(result)

    async def _ended(self, claim: Claim, error: BaseException) -> None:
        """Keep an error that is final, else give the key back.

        Nothing depends on this: where it fails, the claim's lease ends by itself. It is safe also
        where the outcome of a commit is unknown, since a row with an answer is never given back.
        """
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                if _is_final(error):
                    await self._keys.answer(claim, status=status_of(error), answer=_kept(error))
                else:
                    await self._keys.release(claim)
        except (TransientError, InProgressError, TimeoutError) as failed:
            log.warning("idempotency_claim_left", scope=claim.scope, error=type(failed).__name__)


def key_of(call: Call, body: Body | None) -> str | None:
    """The request's key, from its header or its body; `InputError` for one that cannot be."""
    headers = call.request.headers.getall(HEADER, [])
    if len(headers) > 1:
        raise _wrong(HEADER, "This header stands twice.")
    header = headers[0] if headers else None
    alias: object = getattr(body, BODY_FIELD, None)
    for name, key in ((HEADER, header), (BODY_FIELD, alias)):
        if key is not None and not (isinstance(key, str) and _KEY.fullmatch(key)):
            raise _wrong(name, f"It should be 1 to {MAX_KEY_CHARS} visible ASCII characters.")
    if header is not None and alias is not None and alias != header:
        raise _wrong(BODY_FIELD, f"It differs from the header {HEADER}.")
    return header if alias is None else str(alias)


def _scope(call: Call) -> str:
    """Who asks for what: keys of other callers, methods and paths are other keys."""
    path = "/".join(
        quote(call.params[part[1:-1]], safe="") if part.startswith("{") else part
        for part in call.route.split("/")
    )
    return f"{call.identity.kind}:{call.identity.name} {call.request.method} {path}"


def _canonical(raw: bytes) -> bytes:
    """The body in the one way of writing it: two that say the same are the same."""
    tree: object = orjson.loads(raw or b"{}")
    if isinstance(tree, dict):
        tree.pop(BODY_FIELD, None)
    return orjson.dumps(tree, option=orjson.OPT_SORT_KEYS)


def _again(found: Remembered) -> Answer:
    kept = found.answer
    assert isinstance(kept, dict)
    if found.status < 400:
        return Answer(data=orjson.Fragment(kept["data"]), status=found.status, headers=REPLAYED)
    error = kept["error"]
    raise RepeatedError(
        error["message"],
        code=error["code"],
        fields=[FieldError(field, message) for field, message in error["fields"]],
        status=found.status,
        headers=REPLAYED,
    )


def _is_final(error: BaseException) -> TypeGuard[GlamError]:
    """Whether this request would get this error however often it is sent."""
    return isinstance(error, GlamError) and status_of(error) < 500 and status_of(error) != 429


def _kept(error: GlamError) -> dict[str, object]:
    return {
        "error": {
            "code": error.code,
            "message": error.message,
            "fields": [[e.field, e.message] for e in error.fields],
        }
    }


def _wrong(field: str, message: str) -> InputError:
    return InputError("The request is not as it should be.", fields=[FieldError(field, message)])
