"""`dev.json`: the machine-readable description of a running `glamd dev` (spec 6, binding).

Written whole once the daemon is ready, rewritten before the JWTs in it end, removed at stop. What
is described is made elsewhere.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

from glamd.admin.minting import Mint
from glamd.embedded.demo import DemoDevice
from glamd.embedded.files import write_private

REWRITE_AFTER_S: Final = 6 * 3600.0
"""Half of the time that a minted JWT is good for."""
CLIENT_SCOPES: Final = "bff:call"
INTERNAL_SCOPES: Final = (
    "payment:read payment:revoke payment:tokenize credits:write credits:read tokens:read"
)
INTERNAL_SERVICE: Final = "platform-connector"


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditsDemo:
    """The merchant that buys credits, and the stand-in for Shopify where its shop is."""

    merchant_id: str
    domain: str
    shopify_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Everything a script needs to drive this daemon; its files are absolute paths."""

    pid: int
    http_url: str
    worker_url: str
    server_ca: Path
    worker_cert: Path
    worker_key: Path
    mqtt_host: str
    mqtt_port: int
    admin_socket: Path
    database_url: str = field(repr=False)
    database_admin_url: str = field(repr=False)
    nats_url: str = field(repr=False)
    merchant_id: str
    domain: str
    devices: tuple[DemoDevice, ...]
    credits_demo: CreditsDemo
    mint: Mint

    def write(self, path: Path) -> None:
        """Put the description, with fresh JWTs, at `path`, mode 0600, whole."""
        write_private(path, orjson.dumps(self._document(), option=orjson.OPT_INDENT_2))

    def credits_jwt(self) -> str:
        """A fresh JWT of the merchant that buys credits."""
        buyer = self.credits_demo
        return self.mint.client(
            merchant_id=buyer.merchant_id, shop=buyer.domain, scope=CLIENT_SCOPES
        )

    def _document(self) -> dict[str, object]:
        client = self.mint.client(
            merchant_id=self.merchant_id, shop=self.domain, scope=CLIENT_SCOPES
        )
        buyer = self.credits_demo
        internal = self.mint.internal(service=INTERNAL_SERVICE, scope=INTERNAL_SCOPES)
        mqtt = {"host": self.mqtt_host, "port": self.mqtt_port, "ca": str(self.server_ca)}
        return {
            "pid": self.pid,
            "http": {"url": self.http_url},
            "worker": {
                "url": self.worker_url,
                "ca": str(self.server_ca),
                "cert": str(self.worker_cert),
                "key": str(self.worker_key),
            },
            "mqtt": mqtt,
            "admin": {"socket": str(self.admin_socket)},
            "database": {"url": self.database_url, "admin_url": self.database_admin_url},
            "nats": {"url": self.nats_url},
            "jwt": {"client": client, "internal": internal},
            "merchant_id": self.merchant_id,
            "domain": self.domain,
            "devices": [device.document(absolute=True) for device in self.devices],
            "credits_demo": {
                "merchant_id": buyer.merchant_id,
                "domain": buyer.domain,
                "jwt": self.credits_jwt(),
                "shopify": {"url": buyer.shopify_url},
            },
        }
