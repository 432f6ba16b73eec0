"""Who a caller can be. Pure data; how each is recognised: `auth`, `certificates` and the admin.

Scopes are what a token said; whether they suffice is decided by the route table.
"""

from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

Kind = Literal["nobody", "client", "internal", "worker", "device", "operator"]

NO_SCOPES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Nobody:
    """A caller of a public route; nothing about them is known or needed."""

    kind: Kind = "nobody"
    name: str = "-"
    scopes: frozenset[str] = NO_SCOPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A merchant's storefront back end; `name` is the merchant's id."""

    merchant_id: UUID
    shop: str | None
    scopes: frozenset[str]
    kind: Kind = "client"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        # Written out once, and not for each log line and rate limit.
        object.__setattr__(self, "name", str(self.merchant_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Internal:
    """Another service of the same house."""

    name: str
    scopes: frozenset[str]
    kind: Kind = "internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """An authorized worker, by the URI in its client certificate."""

    name: str
    certificate_sha256: str
    scopes: frozenset[str] = NO_SCOPES
    kind: Kind = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A terminal, by the common name of its client certificate, which is its device id."""

    name: str
    certificate_sha256: str
    scopes: frozenset[str] = NO_SCOPES
    kind: Kind = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """A local user at the admin socket, by the kernel's word."""

    uid: int
    gid: int
    pid: int
    scopes: frozenset[str] = NO_SCOPES
    kind: Kind = "operator"

    @property
    def name(self) -> str:
        """What logs know this caller by."""
        return f"uid:{self.uid}"


NOBODY = Nobody()

Identity = Nobody | Client | Internal | Worker | Device | Operator
