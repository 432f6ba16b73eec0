"""A KMS for tests: moto's over real HTTP, and a scripted one for the answers that moto has not."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import boto3
import pytest
from aiohttp import web
from moto.server import ThreadedMotoServer

REGION: Final = "eu-central-1"
SECRET: Final = "wJalrXUtnFEMI-EXAMPLE-SECRET"
CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def dummy_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that are none, and nothing of this machine's own AWS settings."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


class MotoKms:
    """moto's server on a port of its own, and an operator's client to it."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self._client = boto3.client(
            "kms",
            region_name=REGION,
            endpoint_url=self.url,
            aws_access_key_id="operator",
            aws_secret_access_key="operator",
        )

    def create_key(self) -> str:
        """The id of a new symmetric key."""
        return str(self._client.create_key()["KeyMetadata"]["KeyId"])

    def disable(self, key_id: str) -> None:
        """Disable a key."""
        self._client.disable_key(KeyId=key_id)

    def stop(self) -> None:
        """Stop the server."""
        self._client.close()
        self._server.stop()


@dataclass(slots=True)
class ScriptedKms:
    """Answers every request with one status and body, or not at all, as the test says."""

    status: int = 200
    body: Mapping[str, object] = field(default_factory=dict)
    silent: bool = False
    url: str = ""
    requests: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def refuse(self, code: str, *, status: int = 400) -> None:
        """Answer with this error of AWS from now on; its text names an account, as AWS's do."""
        message = f"User: arn:aws:sts::111122223333:assumed-role/x is not authorized {SECRET}"
        self.status, self.body = status, {"__type": code, "message": message}

    async def _answer(self, request: web.Request) -> web.Response:
        target = request.headers["X-Amz-Target"].removeprefix("TrentService.")
        self.requests.append((target, json.loads(await request.read())))
        self.asked.set()
        if self.silent:
            await self.released.wait()
        return web.Response(
            status=self.status,
            body=json.dumps(self.body),
            content_type="application/x-amz-json-1.1",
        )

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator["ScriptedKms"]:
        """It listens while this is entered."""
        application = web.Application()
        application.router.add_post("/", self._answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.released.set()
            await runner.cleanup()
