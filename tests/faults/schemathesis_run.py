"""schemathesis against `glamd dev`, for long: no answer that the document does not have.

The same as in `tests/acceptance/test_openapi.py`, with a thousand drawn cases for each operation
and caller, against a process of its own.
"""

import asyncio
import secrets
from pathlib import Path

import requests

from bench.harness import DevDaemon
from bench.report import Result
from tests.support.dev_client import ask, own_device, tap
from tests.support.fuzzing import DOCUMENTED_5XX, Findings, everybody, fuzz

TIMEOUT_S = 20.0
TOKENS = 3


def fuzzed(folder: Path, *, cases: int, seed: int) -> Findings:
    """Ask every operation of a daemon, as everybody who may, at least `cases` times each."""
    daemon = DevDaemon(folder / "state")
    daemon.start()
    try:
        url = daemon.text("http", "url")
        document = requests.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
        real = {
            "token": asyncio.run(_tokens(daemon)),
            "merchant_id": [daemon.text("merchant_id")],
            "domain": [daemon.text("domain")],
            "purpose": ["settlement"],
            "pack": ["small"],
            "return_url": [f"https://{daemon.text('domain')}/"],
        }
        askers = everybody(
            api_url=url,
            worker_url=daemon.text("worker", "url"),
            client={"Authorization": f"Bearer {daemon.text('jwt', 'client')}"},
            internal={"Authorization": f"Bearer {daemon.text('jwt', 'internal')}"},
            certificate=Path(daemon.text("worker", "cert")),
            key=Path(daemon.text("worker", "key")),
            server_ca=Path(daemon.text("worker", "ca")),
        )
        return fuzz(document, askers, real=real, cases=cases, seed=seed)
    finally:
        daemon.stop()


def results(folder: Path, *, cases: int, seed: int) -> list[Result]:
    """The rows of the report."""
    found = fuzzed(folder, cases=cases, seed=seed)
    for failure in found.failures:
        print(failure)
    asked = sum(found.cases.values())
    fewest = min(found.cases.values())
    errors = sum(
        count
        for (_, status), count in found.answers.items()
        if status >= 500 and status not in DOCUMENTED_5XX
    )
    name = f"schemathesis, {len(found.cases)} operations, ≥ {cases:,} cases each"
    note = f"{asked:,} requests as a client, an internal service, a worker and nobody; seed {seed}"
    return [
        Result(
            name=f"{name}: undocumented 5xx",
            value=errors,
            unit="answers",
            bar="0",
            holds=errors == 0 and fewest >= cases,
            note=note,
        ),
        Result(
            name=f"{name}: undocumented answers, wrong data taken, right data refused",
            value=len(found.failures),
            unit="findings",
            bar="0",
            holds=not found.failures and fewest >= cases,
            note=note,
        ),
    ]


async def _tokens(daemon: DevDaemon) -> list[str]:
    device = await own_device(daemon)
    taps = [tap(device, secrets.token_hex(8)) for _ in range(TOKENS)]
    return [answer.text("token") for answer in await ask(device, *taps)]
