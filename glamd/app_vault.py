"""The chapters of the start about keys and card data: providers, keyrings, audit, tokens, jobs.

A part of the composition root (`glamd.app`), which says when each of them is called. Nothing is
decided here.
"""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final, TypeAlias
from uuid import UUID, uuid4

from glamd import config, wiring
from glamd.admin.routes_rewrap import RewrapRoutes
from glamd.clock import Clock
from glamd.credentials.model import Accessor
from glamd.credentials.resealing.service import PlatformTokenRows
from glamd.credentials.resealing.store import SecretRow as ShopSecretRow
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.erasure import Erasure
from glamd.keys import keyrings
from glamd.keys.key_sets.service import Keys
from glamd.keys.keyrings import DataKey, Keyring, Keyrings, KeyringWatch
from glamd.keys.lifecycle import KeyLife
from glamd.keys.operations import Operations
from glamd.keys.providers.interface import Providers
from glamd.keys.providers.opening import open_providers
from glamd.keys.reencryption import Reencryption
from glamd.keys.rewrapping.service import Rewrapper
from glamd.keys.throttle import Throttle
from glamd.lifetime import Lifetime
from glamd.payments import readers
from glamd.payments.audit import Audit
from glamd.payments.detokenize import Detokenizer, look_ups
from glamd.payments.life.erasure import CardErasure
from glamd.payments.life.service import TokenLife
from glamd.payments.resealing.service import PaymentTokenRows
from glamd.payments.resealing.store import SecretRow as CardSecretRow
from glamd.payments.tokens import Tokens
from glamd.payments.vault import Vault

KNOWN_AFTER_RELOADS: Final = 2
"""Reloads after which every node knows of a rotation: one may just have read when it came."""

PERIODS_EVERY_S: Final = 60.0
ANSWERS_EVERY_S: Final = 60.0
PARTITIONS_EVERY_S: Final = 600.0
SHRED_EVERY_S: Final = 600.0
METADATA_EVERY_S: Final = 3600.0
ERASURE_EVERY_S: Final = 30.0
EXPIRE_EVERY_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMaterial:
    """The keys, and the log of what is done with them.

    The throttles hold re-encryption back where traffic suffers: one for each database.
    """

    providers: Providers
    keyrings: Keyrings
    platform_tokens: Keyring[DataKey]
    audit: Audit
    keys: Keys
    rewrapping: RewrapRoutes
    cde_throttle: Throttle
    glam_throttle: Throttle


async def open_keys(
    settings: config.Settings,
    *,
    cde: Database,
    glam: Database,
    lifetime: Lifetime,
    stack: AsyncExitStack,
    clock: Clock,
) -> KeyMaterial:
    """Open the providers, unwrap every data key, begin to take audit rows."""
    first = settings.keys.first_version
    providers = await open_providers(wiring.key_providers(settings.keys))
    stack.push_async_callback(providers.close)
    rings = await Keyrings.load(cde, providers, clock, first)
    platform_tokens = keyrings.platform_tokens(database=glam, providers=providers)
    await platform_tokens.load(clock, first)
    cde_throttle = Throttle(clock)
    audit = Audit(
        cde,
        rings.audit,
        clock,
        head_every_s=settings.audit.head_every_s,
        head_file=settings.audit.head_file,
        observe=cde_throttle.observe,
    )
    await audit.start()
    lifetime.at_drain(audit.stop)
    operations = Operations(audit.record)
    for ring in (*rings.all(), platform_tokens):
        if ring.first_made is not None:
            subject = f"{ring.name}:{ring.first_made}"
            await operations.write_down("keys.create", subject=subject, actor="glamd", outcome="ok")
    keys = Keys(
        database=cde,
        glam=glam,
        providers=providers,
        identity_key=rings.fingerprints.active.key,
        record=audit.record,
        readers=readers.reader_names,
        clock=clock,
    )
    rewrapper = Rewrapper(database=cde, glam=glam, providers=providers, record=audit.record)
    return KeyMaterial(
        providers=providers,
        keyrings=rings,
        platform_tokens=platform_tokens,
        audit=audit,
        keys=keys,
        rewrapping=RewrapRoutes(rewrapper),
        cde_throttle=cde_throttle,
        glam_throttle=Throttle(clock),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """Payment tokens, from the first commit to the last look."""

    vault: Vault
    tokens: Tokens
    detokenizer: Detokenizer
    life: TokenLife


async def open_cards(
    settings: config.Settings,
    material: KeyMaterial,
    *,
    cde: Database,
    lifetime: Lifetime,
    clock: Clock,
) -> Cards:
    """Begin to take commits, with room made for the days to come."""
    payments = settings.payments
    vault = Vault(
        cde,
        connections=payments.commit_connections,
        batch_limit=payments.commit_batch_limit,
        observe=material.cde_throttle.observe,
    )
    tokens = Tokens(cde, clock=clock)
    life = TokenLife(
        cde,
        tokens=tokens,
        clock=clock,
        default_ttl=timedelta(hours=payments.default_token_ttl_h),
        shred_within=timedelta(hours=payments.shred_within_h),
        keep_metadata=timedelta(days=payments.metadata_days),
    )
    await life.begin()
    await vault.journal.start()
    lifetime.at_drain(vault.journal.stop)
    looks = look_ups(cde)
    await looks.start()
    lifetime.at_drain(looks.stop)
    detokenizer = Detokenizer(
        cde,
        find=looks.submit,
        audit=material.audit,
        keyring=material.keyrings.payment_tokens,
        grants=wiring.grants(settings.worker),
        clock=clock,
    )
    return Cards(vault=vault, tokens=tokens, detokenizer=detokenizer, life=life)


CardRows: TypeAlias = Reencryption[CardSecretRow]
ShopRows: TypeAlias = Reencryption[ShopSecretRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultJobs:
    """What goes on by itself, and what an operator may ask for at once."""

    key_life: KeyLife
    erasure: Erasure
    _jobs: tuple[CardRows, ShopRows]
    _watch: KeyringWatch
    _cards: Cards

    def begin(self, lifetime: Lifetime) -> None:
        """Begin, now that nothing of the start can fail any more."""
        lifetime.task(self._watch.run(), "keyring-watch")
        for job in self._jobs:
            lifetime.task(job.run(), f"re-encryption:{job.keyring.name}")
        cards, life = self._cards, self._cards.life
        for work, every_s, name in (
            (self.key_life.check_periods, PERIODS_EVERY_S, "cryptoperiods"),
            (cards.tokens.announce_expired, EXPIRE_EVERY_S, "token-expiry"),
            (life.tend_partitions, PARTITIONS_EVERY_S, "secrets-partitions"),
            (life.shred, SHRED_EVERY_S, "secrets-shred"),
            (life.purge_answers, ANSWERS_EVERY_S, "token-answers-purge"),
            (life.purge_metadata, METADATA_EVERY_S, "token-metadata-purge"),
            (self.erasure.resume, ERASURE_EVERY_S, "erasure"),
        ):
            lifetime.job(work, every_s=every_s, name=name)


def build_jobs(
    settings: config.Settings,
    material: KeyMaterial,
    cards: Cards,
    *,
    cde: Database,
    glam: Database,
    platform_tokens: PlatformTokens,
    clock: Clock,
) -> VaultJobs:
    """The jobs about keys and tokens; nothing runs yet."""
    keys = settings.keys
    settled_after_s = KNOWN_AFTER_RELOADS * keys.reload_s
    jobs = (
        Reencryption(
            material.keyrings.payment_tokens,
            PaymentTokenRows(cde),
            throttle=material.cde_throttle,
            clock=clock,
            node_id=settings.node_id,
            settled_after_s=settled_after_s,
        ),
        Reencryption(
            material.platform_tokens,
            PlatformTokenRows(glam),
            throttle=material.glam_throttle,
            clock=clock,
            node_id=settings.node_id,
            settled_after_s=settled_after_s,
        ),
    )
    rings = (*material.keyrings.all(), material.platform_tokens)
    key_life = KeyLife(
        rings,
        jobs=jobs,
        operations=Operations(material.audit.record),
        clock=clock,
        cryptoperiods={
            keyrings.PAYMENT_TOKENS: timedelta(days=keys.payment_tokens_cryptoperiod_days),
            keyrings.PLATFORM_TOKENS: timedelta(days=keys.platform_tokens_cryptoperiod_days),
            keyrings.AUDIT: timedelta(days=keys.audit_cryptoperiod_days),
        },
        rotate_automatically=keys.rotate_automatically,
    )
    erasure = Erasure(
        cards=CardErasure(cde, clock=clock),
        forget_platform_tokens=partial(_forget, platform_tokens),
        record=material.audit.record,
    )
    return VaultJobs(
        key_life=key_life,
        erasure=erasure,
        _jobs=jobs,
        _watch=KeyringWatch(rings, interval_s=keys.reload_s),
        _cards=cards,
    )


async def _forget(platform_tokens: PlatformTokens, merchant_id: UUID) -> int:
    correlation_id = f"erasure-{uuid4()}"
    by_us = Accessor(
        kind="glamd",
        name="erasure",
        ip="-",
        request_id=correlation_id,
        correlation_id=correlation_id,
    )
    return await platform_tokens.forget(merchant_id, accessor=by_us)
