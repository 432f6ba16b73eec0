"""TLS on a plain TCP transport: one OpenSSL object and two memory BIOs for each connection.

Not the loop's own TLS, since this one is measured to be two to three times as fast and leaner
(docs/decisions/mqtt-tls.md), and it lets the certificates be replaced for new connections. What
the bytes mean lives above, in `connection`.
"""

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import Final, Protocol, cast

_RECORD_BYTES: Final = 16_384
"""The most plain bytes that one TLS record can hold."""
_PIECE_BYTES: Final = 4_096
"""A memory BIO never gets smaller again, so that a large read goes through it in pieces."""
_TLS_HANDSHAKE: Final = 0x16
# A fixed list: a metric's label must not be whatever a peer can provoke.
_FAILURES: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "UNSUPPORTED_PROTOCOL": "tls_version",
    "NO_SHARED_CIPHER": "no_shared_cipher",
    "CERTIFICATE_VERIFY_FAILED": "certificate_refused",
}


class Flusher(Protocol):
    """Who calls `TlsProtocol.flush` at the end of the loop's tick."""

    def flush_soon(self, connection: "TlsProtocol") -> None:
        """Remembers a connection that has something to send."""


def harden(context: ssl.SSLContext) -> ssl.SSLContext:
    """Sets what the endpoint relies on: TLS 1.2 or later, a client certificate, no resumption.

    A resumed session would skip the check of the certificate's dates, and a session cache would
    keep every terminal's certificates in memory.
    """
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0
    return context


class TlsProtocol(asyncio.Protocol):
    """One connection's TLS; a subclass fills in the hooks, whose names start with `on_`."""

    __slots__ = (
        "_context",
        "_discarding",
        "_established",
        "_flusher",
        "_incoming",
        "_out",
        "_outgoing",
        "_tls",
        "_transport",
    )

    def __init__(self, context: ssl.SSLContext, flusher: Flusher) -> None:
        self._context = context
        self._flusher = flusher
        self._transport: asyncio.Transport
        # Made with the first byte, so that a connection that never speaks costs almost nothing.
        self._tls: ssl.SSLObject | None = None
        self._incoming: ssl.MemoryBIO
        self._outgoing: ssl.MemoryBIO
        self._established = False
        self._discarding = False
        self._out: list[bytes] = []

    def on_opened(self) -> None:
        """The TCP connection is there."""

    def on_established(self, tls: ssl.SSLObject) -> None:
        """The handshake is done and the client's certificate verified."""

    def on_plain(self, data: bytes) -> None:
        """Decrypted bytes came in."""

    def on_broken(self, reason: str) -> None:
        """TLS cannot go on, or the peer ended it; `reason` is stable and in snake case."""

    def on_lost(self) -> None:
        """The TCP connection is gone."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: a client has connected."""
        self._transport = cast("asyncio.Transport", transport)
        self.on_opened()

    def connection_lost(self, _exc: Exception | None) -> None:
        """asyncio's: the transport is closed for whatever reason."""
        self.on_lost()
        # Whoever still knows this connection must not keep its 25 KB of OpenSSL alive.
        self._tls = None
        self._discarding = True
        self._out.clear()

    def eof_received(self) -> None:
        """asyncio's: the peer sends no more; the transport closes itself after this."""
        self.on_broken("closed_by_peer")

    def data_received(self, data: bytes) -> None:
        """asyncio's: encrypted bytes came in."""
        if self._discarding:
            return
        if self._established:
            self._read(data)
        elif self._handshake(data):
            self._read(b"")

    def _handshake(self, data: bytes) -> bool:
        """Goes on with the handshake; True when it is done and bytes are left to read."""
        if self._tls is None:
            if data[0] != _TLS_HANDSHAKE:
                self.on_broken("not_tls")
                return False
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = self._context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._write_records()
            return False
        except ssl.SSLError as error:
            self._write_records()  # the alert that tells the client why
            self.on_broken(_failure(error))
            return False
        self._write_records()
        self._established = True
        self.on_established(self._tls)
        return self._incoming.pending > 0

    def _read(self, data: bytes) -> None:
        """Decrypts all that has come in and hands it up in one piece."""
        chunks: list[bytes] = []
        if len(data) <= _PIECE_BYTES:
            self._incoming.write(data)
            ended = self._decrypt(chunks)
        else:
            ended = ""
            for at in range(0, len(data), _PIECE_BYTES):
                self._incoming.write(data[at : at + _PIECE_BYTES])
                ended = self._decrypt(chunks)
                if ended:
                    break
        if chunks:
            self.on_plain(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        if ended:
            self.on_broken(ended)
        elif self._outgoing.pending:
            self._write_records()  # TLS has something to say itself: a key update

    def _decrypt(self, chunks: list[bytes]) -> str:
        """Adds what can be decrypted now; returns why nothing more will come, if so."""
        incoming, tls = self._incoming, cast("ssl.SSLObject", self._tls)
        try:
            # Asking first saves the exception that a read with nothing to read ends in.
            while incoming.pending or tls.pending():
                chunk = tls.read(_RECORD_BYTES)
                if not chunk:
                    return "closed_by_peer"
                chunks.append(chunk)
        except ssl.SSLWantReadError:
            pass  # half a record; OpenSSL keeps it
        except ssl.SSLError:
            return "tls_error"
        return ""

    def socket(self) -> socket.socket:
        """The TCP socket, for its options."""
        return cast("socket.socket", self._transport.get_extra_info("socket"))

    def send(self, data: bytes) -> None:
        """Sends plain bytes at the end of the loop's tick, all of them as one record and write.

        Not at the end of this read: a peer that is woken once for many answers costs both sides
        less than one that is woken for each (a sixth of the whole echo in `bench.endpoint`).
        """
        if not self._out:
            self._flusher.flush_soon(self)
        self._out.append(data)

    def flush(self) -> None:
        """Encrypts and writes what was given to `send`: one record, if it fits one."""
        tls, out = self._tls, self._out
        if tls is None:
            return
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            sent = 0
            try:
                while sent < len(data):  # a client may ask for records as short as 512 bytes
                    sent += tls.write(data[sent : sent + _RECORD_BYTES])
                    self._write_records()
            except ssl.SSLError:
                self.on_broken("tls_error")
                return
        else:
            self._write_records()

    def _write_records(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def finish(self) -> None:
        """Sends what is left and TLS's goodbye, then waits for the peer to close.

        What still comes in is thrown away: closing at once with unread bytes would make the
        kernel send a reset, which can overtake our last packet.
        """
        self.flush()
        self._discarding = True
        if self._tls is not None and self._established:
            with suppress(ssl.SSLError):  # the peer's own goodbye is not waited for
                self._tls.unwrap()
            self._write_records()
        self._transport.write_eof()
        self._transport.resume_reading()

    def abort(self) -> None:
        """Cuts the connection; what is unsent is lost."""
        self._discarding = True
        self._out.clear()
        self._transport.abort()


def _failure(error: ssl.SSLError) -> str:
    """OpenSSL's own name for what went wrong in a handshake, for the metric."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "certificate_refused"
    return _FAILURES.get(error.reason or "", "handshake_failed")
