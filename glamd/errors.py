"""The one tree of errors that glamd raises on purpose; transports map it, nothing else does.

    GlamError                      has a stable `code`, a message safe to show, maybe fields
    ├── ConfigError                a setting is wrong or missing; the start ends with exit 78
    ├── InputError                 the request is wrong; the same request will always be wrong
    ├── UnauthenticatedError       nobody knows who is asking
    ├── ForbiddenError             we know who is asking, and they may not
    ├── NotFoundError              there is no such thing for this caller
    ├── ConflictError              it contradicts what is already there
    ├── GoneError                  it was there and is not any more
    ├── CryptoError                a ciphertext, MAC, key block or check value does not verify
    └── TransientError             not now; asking the same again later may work
        ├── RateLimitedError       the caller asks too often
        ├── UnavailableError       a part that is needed is away, full or draining
        └── InternalError          we are at fault; the detail is in the log, not in the message

No HTTP status, MQTT reason code or SQLSTATE stands here: the first two belong to the transports,
the last to `glamd.db`. A message never holds a PAN, track, key, token secret or SQL text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field that is wrong: its dotted name, and why, without its value."""

    field: str
    message: str


class GlamError(Exception):
    """The root: `code` is stable and upper-case, `message` is one sentence without secrets."""

    default_code = "INTERNAL_ERROR"
    retryable = False
    members: Mapping[str, object] = MappingProxyType({})
    """What else a program may want to know, by name; as safe to show as the message."""

    def __init__(
        self, message: str, *, code: str | None = None, fields: Sequence[FieldError] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.fields = tuple(fields)


class ConfigError(GlamError):
    """A setting is wrong or missing; `fields` names every one of them at once."""

    default_code = "CONFIG_ERROR"


class InputError(GlamError):
    """The request itself is wrong and stays wrong however often it is sent."""

    default_code = "VALIDATION_ERROR"


class UnauthenticatedError(GlamError):
    """No valid identity came with the request."""

    default_code = "UNAUTHENTICATED"


class ForbiddenError(GlamError):
    """The identity is valid and has no right to this."""

    default_code = "FORBIDDEN"


class NotFoundError(GlamError):
    """There is no such thing, or none that this caller may know of."""

    default_code = "NOT_FOUND"


class ConflictError(GlamError):
    """The request contradicts what is already stored."""

    default_code = "CONFLICT"


class GoneError(GlamError):
    """The thing was there once and will not come back."""

    default_code = "GONE"


class CryptoError(GlamError):
    """A ciphertext, MAC, key block or check value does not verify; it says which, not its bytes."""

    default_code = "CRYPTO_ERROR"


class TransientError(GlamError):
    """No effect is promised; the same request may succeed after `retry_after_s` seconds.

    It may have had its effect all the same, where an answer or a commit got lost: what is sent
    again must be idempotent.
    """

    default_code = "UNAVAILABLE"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        fields: Sequence[FieldError] = (),
        retry_after_s: int = 1,
    ) -> None:
        super().__init__(message, code=code, fields=fields)
        self.retry_after_s = retry_after_s


class RateLimitedError(TransientError):
    """The caller asks more often than it may."""

    default_code = "RATE_LIMITED"


class UnavailableError(TransientError):
    """A part that this needs is away, full, too slow, or draining."""

    default_code = "UNAVAILABLE"


class InternalError(TransientError):
    """Our own fault. The cause is logged where it is raised and never shown to a caller."""

    default_code = "INTERNAL_ERROR"
