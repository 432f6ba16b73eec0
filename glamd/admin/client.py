"""glamctl's end of the wire: one HTTP request over the admin socket, one answer.

Only the standard library, so that a command starts quickly. What an answer means to a person is
for the commands.
"""

import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlencode

TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024


class CommandError(Exception):
    """The command was not done: a stable `code`, why, and the fields that are wrong."""

    def __init__(self, code: str, message: str, fields: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        """`code: message (field: what is wrong with it)`, in one line."""
        shown = "; ".join(f"{name}: {text}" for name, text in self.fields)
        # Some messages are what is wrong with the field and nothing else; said once it is enough.
        message = "This is not as it should be." if shown == self.message else self.message
        return f"{self.code}: {message}" + (f" ({shown})" if shown else "")


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("glamd", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket file."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class AdminClient:
    """Gives commands to the daemon behind one socket file."""

    def __init__(self, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def get(self, path: str, query: Mapping[str, object] | None = None) -> object:
        """What is at `path`. Raises `CommandError`."""
        given = {name: value for name, value in (query or {}).items() if value is not None}
        return self._ask("GET", f"{path}?{urlencode(given)}" if given else path, None)

    def post(
        self, path: str, body: Mapping[str, object] | None = None, *, timeout_s: float | None = None
    ) -> object:
        """Have something done. Raises `CommandError`."""
        return self._ask("POST", path, body, timeout_s)

    def put(self, path: str, body: Mapping[str, object]) -> object:
        """Set something. Raises `CommandError`."""
        return self._ask("PUT", path, body)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        timeout_s: float | None = None,
    ) -> object:
        connection = _UnixConnection(self._path, timeout_s or self._timeout_s)
        raw = None if body is None else json.dumps(body).encode()
        headers = {} if raw is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, raw, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()
        try:
            parsed: object = json.loads(text)
        except ValueError:
            raise CommandError("BAD_ANSWER", "The answer is no JSON; is this glamd?") from None
        if status >= 400:
            raise _refusal(parsed)
        return parsed

    def _unreachable(self, error: OSError | http.client.HTTPException) -> CommandError:
        where = str(self._path)
        reasons: dict[type[BaseException], str] = {
            FileNotFoundError: f"there is no socket at {where}; is glamd running?",
            ConnectionRefusedError: f"nobody listens at {where}; is glamd running?",
            PermissionError: f"{where} is not for this user; ask for its group",
            TimeoutError: f"no answer in time at {where}",
        }
        why = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
        return CommandError("UNREACHABLE", why or f"the connection to {where} broke: {error}")


def segment(text: str) -> str:
    """An id as one segment of a path."""
    return quote(text, safe="")


def _refusal(parsed: object) -> CommandError:
    """The problem that the daemon answered with."""
    problem = parsed if isinstance(parsed, dict) else {}
    listed = problem.get("errors")
    fields = tuple(
        (str(entry.get("field")), str(entry.get("message")))
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict)
    )
    code, detail = problem.get("code"), problem.get("detail")
    return CommandError(str(code or "BAD_ANSWER"), str(detail or "no reason was given"), fields)
