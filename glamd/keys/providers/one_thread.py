"""The one thread of this process that speaks to PKCS#11 modules.

python-pkcs11 0.10.1 crashed with sessions on several threads, and a module is one thing to its
whole process, with one login: so there is one thread for all providers, and what they ask of it
waits in line. What is done on it is for `hsm`.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

from glamd.errors import UnavailableError

T = TypeVar("T")

WAITING_LIMIT: Final = 64
"""How many calls may wait; at a few milliseconds each they are all served in good time."""


class OneThread:
    """Runs calls one after the other on a thread of its own, which starts with the first one."""

    def __init__(self, *, name: str, waiting_limit: int = WAITING_LIMIT) -> None:
        self._name = name
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue(waiting_limit)
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. UnavailableError at once where too many calls wait.

        A call that is cancelled before its turn is left out; one that is under way ends unheard.
        """
        answer: Future[T] = Future()

        def call() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                result = work()
            # Whatever it is belongs to who asked, and must not end the thread.
            except BaseException as error:  # noqa: BLE001 - handed on as it is, not handled
                answer.set_exception(error)
            else:
                answer.set_result(result)

        try:
            self._calls.put_nowait(call)
        except queue.Full:
            message = "The key provider pkcs11 has too many calls waiting for its HSM."
            raise UnavailableError(message) from None
        self._start()
        return await asyncio.wrap_future(answer)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                # A daemon thread: an HSM that never answers must not hold up the process's end.
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        while True:
            self._calls.get()()


PKCS11: Final = OneThread(name="pkcs11")
