"""`glamctl import credits|billing`: real older tables, a daemon's socket, runs that break off."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import Result

import glamd.logs
from glamd.admin.client import AdminClient, CommandError
from glamd.admin.routes_import import ImportRoutes
from glamd.billing.importing.service import BillingImporter
from glamd.billing.model import BillingSettings
from glamd.billing.service import Billing
from glamd.errors import UnavailableError
from glamd.ledger.importing.merchant import OlderMerchant, Taken
from glamd.ledger.importing.service import CreditImporter
from glamd.ledger.verify import verify
from glamd.merchants.service import Merchants
from glamd.onboarding import Onboarding
from tests.support import ledgers, older_money
from tests.support.admin_world import AdminWorld
from tests.support.at_terminal import at_terminal
from tests.support.ledgers import Node
from tests.support.money_world import Admin
from tests.support.older_money import account, fill, history, purchase, record, usual
from tests.support.older_service import merchant_id
from tests.support.postgres import PostgresServer, execute
from tests.support.settable_clock import SettableClock

GLAMCTL = Path(sys.executable).with_name("glamctl")
LONG_S = 30.0
TABLES = (
    "glam.credit_accounts, glam.credit_transactions, glam.billing_records, glam.credit_purchases,"
    " glam.imports, glam.outbox, glam.merchants, cde.merchants"
)


@dataclass(slots=True)
class Gate:
    """An importer before which merchants can be held up, or whose answer can get lost."""

    importer: Any
    taken: list[str] = field(default_factory=list)
    begun: int = 0
    hold_at: int | None = None
    held: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    lose_answer_at: int | None = None

    async def take(
        self, merchant: OlderMerchant, *, strict: bool = False, dry_run: bool = False
    ) -> Taken:
        """The importer's, and what a test wants to go wrong."""
        self.begun += 1
        if self.begun == self.hold_at:
            self.held.set()
            await self.go_on.wait()
        found: Taken = await self.importer.take(merchant, strict=strict, dry_run=dry_run)
        self.taken.append(found.merchant_id)
        if len(self.taken) == self.lose_answer_at:
            raise UnavailableError("The answer is lost.")
        return found


@dataclass(slots=True)
class Site:
    """A daemon's admin socket, its database, and the older services' one."""

    admin: AdminWorld
    node: Node
    older_url: str
    gate: Gate

    async def run(self, *words: str) -> Result:
        """`glamctl import …` to its end, in this process for speed."""
        source = (
            () if any(w.startswith("--from") for w in words) else ("--from-url", self.older_url)
        )
        async with asyncio.timeout(LONG_S):
            return await self.admin.glamctl("import", *words, *source)

    def command(self, *words: str) -> list[str]:
        """The words of the command as a process."""
        return [str(GLAMCTL), "--socket", str(self.admin.path), "import", *words]

    async def balances(self) -> dict[Any, int]:
        """Every account's."""
        rows = await self.node.database.fetch(
            "SELECT merchant_id, balance FROM glam.credit_accounts"
        )
        return {row[0]: row[1] for row in rows}


@pytest.fixture(scope="module")
def older_server(postgres_server: PostgresServer) -> Iterator[str]:
    """The older services' database."""
    url = postgres_server.create_database(migrated=False)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
async def site(
    admin: AdminWorld,
    older_server: str,
    module_database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Site]:
    """All of it, empty and running; at the end the books are right."""
    # A command in this process must not turn this process's logging round.
    monkeypatch.setattr(glamd.logs, "configure", lambda *_args: None)
    await execute(older_server, older_money.DROP + older_money.TABLES)
    await execute(module_database_url, f"TRUNCATE {TABLES} CASCADE")
    clock = SettableClock()
    async with ledgers.node(module_database_url) as node:
        merchants = Merchants(glam=node.database, cde=node.database, clock=clock)
        gate = Gate(CreditImporter(node.database, ledger=node.ledger, clock=clock))
        routes = ImportRoutes(
            credits=gate,
            billing=BillingImporter(node.database, clock=clock),
            merchants=merchants,
            onboarding=Onboarding(
                glam=node.database,
                merchants=merchants,
                billing=_billing(node, clock),
                ledger=node.ledger,
            ),
        )
        async with Admin(admin.path).serving(admin.world, routes.routes()):
            yield Site(admin, node, older_server, gate)
        routes.close()
        assert (await verify(node.database)).broken == ()


def _billing(node: Node, clock: SettableClock) -> Billing:
    async def no_shop(_merchant_id: object) -> Any:
        raise AssertionError("nobody pays")

    return Billing(
        node.database,
        ledger=node.ledger,
        platforms=(),
        shop_of=no_shop,
        clock=clock,
        settings=BillingSettings(),
    )


async def fill_credits(site: Site, *numbers: int, debits: int = 3) -> None:
    """Accounts with the usual moves."""
    await fill(
        site.older_url,
        "credit_accounts",
        [
            account(n, 600 - debits, total_granted="600", total_consumed=str(debits))
            for n in numbers
        ],
    )
    rows = [row for n in numbers for row in history(n, *usual(n, debits))]
    await fill(site.older_url, "credit_transactions", rows)


def one_line(result: Result, status: int = 1) -> str:
    """The one line on stderr of a command that failed."""
    assert result.exit_code == status, result.output
    assert result.stderr.count("\n") == 1, result.output
    assert "secret-password" not in result.output
    return result.stderr.rstrip("\n")


def answer(result: Result, status: int = 0) -> Any:
    """The final object of a command that came to its end."""
    assert (result.exit_code, result.stderr) == (status, ""), result.output
    return json.loads(result.stdout)


def some(found: Any) -> dict[str, int]:
    """The outcomes that are not 0."""
    return {name: count for name, count in found["outcomes"].items() if count}


def sums(found: Any) -> dict[str, tuple[str, str]]:
    """What is there and here."""
    return {line["what"]: (line["older"], line["here"]) for line in found["totals"]}


class TestSources:
    """What cannot be read is one line, and nothing is brought over."""

    async def test_a_column_that_is_missing_is_named_and_a_name_mends_it(self, site: Site) -> None:
        await fill_credits(site, 1)
        await execute(
            site.older_url,
            'ALTER TABLE credit_accounts RENAME balance TO "credits ""left";'
            " ALTER TABLE credit_accounts RENAME platform_domain TO shop_domain;"
            " ALTER TABLE credit_transactions DROP metadata, DROP description, DROP balance_before;"
            " CREATE VIEW moves AS SELECT * FROM credit_transactions",
        )
        line = one_line(await site.run("credits"))
        assert line.startswith("COLUMNS_MISSING: There is nothing for balance in credit_accounts.")
        assert "platform_id, shop_domain" in line
        found = answer(
            await site.run(
                "credits",
                "--column",
                'credit_accounts.balance=credits "left',
                "--table",
                "credit_transactions=public.moves",
                "--json",
            )
        )
        assert some(found) == {"taken": 1}
        assert await site.balances() == {merchant_id(1): 597}

    async def test_what_is_said_wrongly_is_2(self, site: Site, tmp_path: Path) -> None:
        empty = tmp_path / "url"
        empty.write_text("\n")
        for words in (
            ("credits", "--column", "balance=x"),
            ("credits", "--column", "purchases.amount=x"),
            ("billing", "--table", "x"),
            ("billing", "--from-url-file", str(empty)),
            ("billing", "--from-url-file", str(empty), "--from-url", "x"),
        ):
            one_line(await site.run(*words), 2)

    async def test_a_database_or_table_that_is_not_there_is_one_line(self, site: Site) -> None:
        away = "postgresql://nobody:secret-password@127.0.0.1:1/none"
        line = one_line(await site.run("credits", "--from-url", away))
        assert line.startswith("UNAVAILABLE: The older database: ")
        line = one_line(await site.run("billing", "--table", "purchases=public.x; DROP TABLE y"))
        assert line.startswith("NO_TABLE: ")


class TestCredits:
    """Accounts with their transactions."""

    async def test_all_comes_over_with_its_merchant_and_both_sides_agree(self, site: Site) -> None:
        await fill_credits(site, *range(1, 41))
        tried = answer(await site.run("credits", "--dry-run", "--json"))
        assert (some(tried), await site.balances()) == ({"taken": 40}, {})
        found = answer(await site.run("credits", "--json"))
        assert some(found) == {"taken": 40}
        assert sums(found) == sums(tried)
        assert sums(found) == {
            "accounts": ("40", "40"),
            "transactions": ("200", "200"),
            "balance": ("23880", "23880"),
            "credits": ("24000", "24000"),
            "debits": ("120", "120"),
            "total granted": ("24000", "24000"),
            "total consumed": ("120", "120"),
        }
        assert await site.balances() == {merchant_id(n): 597 for n in range(1, 41)}
        known = await site.node.database.fetchrow(
            "SELECT * FROM glam.merchants WHERE merchant_id = $1", merchant_id(7)
        )
        assert known is not None
        assert (known["platform"], known["domain"]) == ("shopify", "shop-7.myshopify.com")
        again = await site.run("credits")
        assert again.exit_code == 0
        assert "All is here." in again.stdout
        assert "240 of 240 rows" in again.stdout

    async def test_wrong_rows_and_odd_books_are_told_and_the_others_go_on(self, site: Site) -> None:
        await fill_credits(site, 1, 2, 3)
        await fill(site.older_url, "credit_accounts", [account(4, 90), account(5, -2)])
        orphan = history(9, (5, "purchase", "p"))
        await fill(site.older_url, "credit_transactions", orphan)
        await execute(
            site.older_url,
            f"UPDATE credit_transactions SET operation = 'hold' WHERE id ="
            f" '{older_money.transaction_id(2, 4)}'",
        )
        await fill(site.older_url, "credit_accounts", [account(6, 0, platform_name="etsy")])
        found = answer(await site.run("credits", "--json"), 1)
        assert some(found) == {"taken": 5, "refused": 2}
        told = {(one["table"], one["id"], one["field"]) for one in found["refused"]}
        assert told == {
            ("credit_transactions", str(older_money.transaction_id(2, 4)), "operation"),
            ("credit_transactions", str(merchant_id(9)), "merchant_id"),
            ("-", str(merchant_id(6)), "-"),
        }
        noted = {one["merchant_id"]: one["notes"] for one in found["noted"]}
        assert noted[str(merchant_id(4))]["closing"] == 90
        assert sums(found)["accounts"] == ("6", "5")
        balances = await site.balances()
        assert [balances.get(merchant_id(n)) for n in range(1, 6)] == [597, None, 597, 90, 0]
        shown = await site.run("credits", "--strict")
        assert shown.exit_code == 1
        assert "closing -597" not in shown.stdout
        assert "It is none of credit, debit." in shown.stdout
        assert "Not all is here" in shown.stdout

    async def test_an_account_that_moved_here_is_told_when_it_changed_there(
        self, site: Site
    ) -> None:
        await fill_credits(site, 1, 2)
        answer(await site.run("credits", "--json"))
        await site.node.ledger.apply(ledgers.command(merchant_id(1), "debit", 1, "here"))
        assert some(answer(await site.run("credits", "--json"))) == {"already": 2}
        late = history(1, *usual(1, 5))[-1:] + history(2, *usual(2, 5))[-1:]
        await fill(site.older_url, "credit_transactions", late)
        await execute(site.older_url, "UPDATE credit_accounts SET balance = 596")
        found = answer(await site.run("credits", "--json"), 1)
        assert some(found) == {"updated": 1, "moved_on": 1}
        assert await site.balances() == {merchant_id(1): 596, merchant_id(2): 596}

    async def test_a_long_history_comes_in_parts_and_is_seen_whole(self, site: Site) -> None:
        await fill_credits(site, 1)
        await fill_credits(site, 2, debits=2_600)
        await fill_credits(site, 3)
        found = answer(await site.run("credits", "--json"))
        assert some(found) == {"taken": 3}
        assert sums(found)["transactions"] == ("2612", "2612")
        assert len(site.gate.taken) == 3


class TestCuts:
    """Runs that end before they are through."""

    async def test_a_killed_run_and_a_lost_answer_are_mended_by_the_same_command(
        self, site: Site
    ) -> None:
        await fill_credits(site, *range(1, 13), debits=200)
        site.gate.hold_at = 5
        process = await asyncio.create_subprocess_exec(
            *site.command("credits"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "", "GLAMD_IMPORT_URL": site.older_url},
        )
        async with asyncio.timeout(LONG_S):
            await site.gate.held.wait()
            process.send_signal(signal.SIGKILL)
            await process.communicate()
        # What the daemon was at, it may end; the next request waits for that.
        site.gate.taken.clear()
        site.gate.lose_answer_at = 10
        site.gate.go_on.set()
        line = one_line(await site.run("credits"))
        assert line.startswith("UNAVAILABLE: ")
        assert "merchants are done; the same command finds them and does the others." in line
        site.gate.lose_answer_at = None
        found = answer(await site.run("credits", "--json"))
        assert found["outcomes"]["already"] >= 4
        assert sum(found["outcomes"].values()) == 12
        assert await site.balances() == {merchant_id(n): 400 for n in range(1, 13)}
        counted = await site.node.database.fetchval("SELECT count(*) FROM glam.credit_transactions")
        assert counted == 12 * 202

    async def test_a_merchant_whose_beginning_got_lost_is_not_imported_by_its_end(
        self, site: Site
    ) -> None:
        part = {"merchant_id": str(merchant_id(1)), "heads": [], "rows": [], "ends": True}
        body = {"run": "r", "parts": [part | {"begins": False}]}
        client = AdminClient(site.admin.path)
        with pytest.raises(CommandError) as raised:
            await asyncio.to_thread(client.post, "/v1/import/credits", body)
        assert raised.value.code == "IMPORT_MOVED"
        begin = {**part, "heads": [account(1, 5)], "begins": True, "ends": False}
        await asyncio.to_thread(client.post, "/v1/import/credits", {"run": "a", "parts": [begin]})
        with pytest.raises(CommandError):
            await asyncio.to_thread(client.post, "/v1/import/credits", body)
        assert await site.balances() == {}

    async def test_at_a_terminal_a_bar_shows_how_far_it_is(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await fill_credits(site, 1, debits=2_000)
        monkeypatch.setenv("GLAMD_IMPORT_URL", site.older_url)
        monkeypatch.setenv("TERM", "xterm")
        status, shown = await asyncio.to_thread(at_terminal, site.command("credits"), [])
        assert status == 0
        assert "2003/2003" in shown
        assert "rows/s" in shown


class TestBilling:
    """Records with their purchases."""

    async def test_all_comes_over_and_both_sides_agree_to_the_cent(self, site: Site) -> None:
        numbers = range(1, 21)
        await fill_credits(site, *numbers)
        answer(await site.run("credits", "--json"))
        await fill(site.older_url, "billing_records", [record(n) for n in numbers])
        bought = [purchase(n) for n in numbers]
        failed = [
            purchase(n, 1, status="failed", amount="0.10", completed_at=None) for n in numbers
        ]
        await fill(site.older_url, "purchases", bought + failed)
        found = answer(await site.run("billing", "--json"))
        assert some(found) == {"taken": 20}
        assert sums(found) == {
            "merchants": ("20", "20"),
            "trials": ("20", "20"),
            "purchases": ("40", "40"),
            "completed credits": ("2000", "2000"),
            "amount USD": ("201.8", "201.8"),
            "credits purchased": ("2000", "2000"),
        }
        assert some(answer(await site.run("billing", "--json"))) == {"already": 20}

    async def test_wrong_money_is_named_and_a_merchant_nobody_knows_is_told(
        self, site: Site
    ) -> None:
        await fill(site.older_url, "billing_records", [record(1), record(2)])
        await fill(site.older_url, "purchases", [purchase(1), purchase(2, amount="9.999")])
        found = answer(await site.run("billing", "--json"), 1)
        assert some(found) == {"taken": 1, "refused": 1}
        named = {(one["table"], one["id"], one["field"]) for one in found["refused"]}
        assert named == {
            ("purchases", str(older_money.purchase_id(2, 0)), "amount"),
            ("-", str(merchant_id(1)), "-"),
        }

    async def test_the_older_database_is_only_read_and_never_named_to_the_daemon(
        self, site: Site, logs: list[MutableMapping[str, Any]]
    ) -> None:
        await fill(site.older_url, "billing_records", [record(1)])
        await fill(site.older_url, "purchases", [purchase(1)])
        digest = "SELECT md5(string_agg(t::text, '')) FROM purchases t"
        connection: Any = await asyncpg.connect(site.older_url, timeout=LONG_S)
        try:
            before = await connection.fetchval(digest)
            await site.run("billing")
            assert await connection.fetchval(digest) == before
        finally:
            await connection.close(timeout=LONG_S)
        assert site.older_url not in json.dumps(logs, default=str)
