"""The client's side of TLS on a plain TCP transport, for terminals that have to be cheap.

As in `device_gateway.mqtt.tls`, and for its reason: the loop's own TLS costs two to three times as
much, and a load must not take from the daemon the time that it measures. Every certificate is
checked by OpenSSL as the context says; nothing about that is decided here.
"""

import asyncio
import ssl
from contextlib import suppress
from typing import Final, cast

_READ_BYTES: Final = 65_536


class ClientTls(asyncio.Protocol):
    """One TLS connection; a subclass fills in `on_established`, `on_plain` and `on_lost`."""

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._transport: asyncio.Transport | None = None
        self._established = False
        self._corked = False
        self._out: list[bytes] = []
        self._error: Exception | None = None

    def on_established(self) -> None:
        """The handshake is done and the server's certificate is good."""

    def on_plain(self, data: bytes) -> None:
        """Decrypted bytes came in; what is written now goes out at once, at the end."""

    def on_lost(self, error: Exception | None) -> None:
        """The connection is gone: why, as far as TLS or the system know."""

    # For the subclass.

    def write(self, data: bytes) -> None:
        """Encrypt and send; nothing where there is no connection any more."""
        self._out.append(data)
        if not self._corked:
            self._flush()

    def close_gently(self) -> None:
        """Say that no more comes, and close."""
        # Raises because the peer has not said the same yet, for which nobody waits.
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        self._send_records()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close without a word."""
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP stands; the client speaks first."""
        # uvloop's transports are no subclass of asyncio's, they only behave like one.
        self._transport = cast("asyncio.Transport", transport)
        self._receive(b"")

    def data_received(self, data: bytes) -> None:
        """Encrypted bytes came in."""
        self._receive(data)

    def connection_lost(self, error: Exception | None) -> None:
        """TCP is gone."""
        self._transport = None
        self.on_lost(self._error or error)

    # Inside.

    def _receive(self, data: bytes) -> None:
        self._corked = True
        try:
            self._incoming.write(data)
            if self._established or self._handshake():
                self._read()
        except ssl.SSLError as error:
            self._send_records()  # the alert that says why
            self._error = self._error or error
            self._established = False
            self.abort()
        finally:
            self._corked = False
            self._flush()

    def _handshake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_records()
            return False
        self._established = True
        self.on_established()
        return True

    def _read(self) -> None:
        """Everything that is whole by now, in one piece."""
        pieces = []
        try:
            # Asking once more than there is costs an exception, which is dearer than the question.
            while self._incoming.pending and self._transport is not None:
                piece = self._tls.read(_READ_BYTES)
                if not piece:  # the peer's goodbye
                    self._transport.close()
                    break
                pieces.append(piece)
        except ssl.SSLWantReadError:
            pass
        finally:
            # Also before an alert: the server's last words stand in front of it.
            if pieces:
                self.on_plain(b"".join(pieces))

    def _flush(self) -> None:
        transport = self._transport
        if self._out and self._established and transport is not None:
            if not transport.is_closing():
                self._tls.write(b"".join(self._out))
                transport.write(self._outgoing.read())
            self._out.clear()

    def _send_records(self) -> None:
        if self._outgoing.pending and self._transport is not None:
            self._transport.write(self._outgoing.read())
