"""The key provider `aws-kms`: keys wrapped by a key of AWS KMS, which never leaves it.

KMS cannot derive DUKPT keys, so a BDK is unwrapped into this process for it: a P2PE assessment does
not accept that, and the docs say so. This file wants the extra `aws` and is imported by `opening`
alone, once the configuration names this provider. No database here.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

import aioboto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError
from typing_extensions import override

from glamd.errors import ConfigError, CryptoError, FieldError, UnavailableError
from glamd.keys.providers.in_memory import BdksInMemory
from glamd.keys.providers.interface import ProviderName

FORMAT: Final = b"\x02"
"""First byte of what `wrap` returns: a ciphertext blob of KMS follows."""

CONTEXT_NAME: Final = "glamd:key"
"""What the key's name is called in KMS's encryption context, in IAM conditions and CloudTrail."""

CONNECT_TIMEOUT_S: Final = 1.0
READ_TIMEOUT_S: Final = 1.2
ATTEMPTS: Final = 2
"""Two whole attempts fit into the time that a provider has (`interface.TIMEOUT_S`)."""

CONNECTIONS: Final = 8

_TRANSIENT: Final = frozenset(
    {
        "DependencyTimeoutException",
        "ExpiredTokenException",
        "InternalFailure",
        "KMSInternalException",
        "KeyUnavailableException",
        "LimitExceededException",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_DOES_NOT_OPEN: Final = frozenset({"IncorrectKeyException", "InvalidCiphertextException"})
_REMEDIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "AccessDeniedException": "allow it to glamd's AWS identity in IAM and in the key's policy",
        "NotFoundException": "there is no such key in this region; correct the key's id",
        "DisabledException": "the key is disabled; enable it",
        "KMSInvalidStateException": "the key is not usable, as when its deletion is pending",
        "InvalidKeyUsageException": "the key must be a symmetric one to encrypt and decrypt with",
    }
)
_NOT_ACCEPTED: Final = frozenset(
    {
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)

# botocore writes whole requests into its debug log, and the body of an Encrypt is a key.
for _name in ("aioboto3", "aiobotocore", "boto3", "botocore"):
    logging.getLogger(_name).setLevel(logging.INFO)


class KmsClient(Protocol):
    """What of aiobotocore's generated client is used here; the requests' members are AWS's."""

    async def encrypt(self, **request: object) -> Mapping[str, object]:
        """`KeyId`, `Plaintext`, `EncryptionContext`; its answer's `CiphertextBlob` is bytes."""

    async def decrypt(self, **request: object) -> Mapping[str, object]:
        """`KeyId`, `CiphertextBlob`, `EncryptionContext`; its answer's `Plaintext` is bytes."""

    async def describe_key(self, **request: object) -> Mapping[str, Mapping[str, object]]:
        """`KeyId`; its answer's `KeyMetadata` has `Enabled`, a boolean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KmsSettings:
    """Which keys of KMS, and where; an id, an ARN or an alias each.

    `bdk_key_id` wraps base derivation keys, `key_id` where it is None. What the `former_key_ids`
    wrapped still opens. Credentials are found as every AWS SDK finds them.
    """

    key_id: str
    bdk_key_id: str | None = None
    former_key_ids: Sequence[str] = ()
    region: str | None = None
    endpoint_url: str | None = None


class AwsKmsProvider(BdksInMemory):
    """Wraps keys by KMS calls, each bound to its own name by KMS's encryption context."""

    @property
    @override
    def name(self) -> ProviderName:
        """`aws-kms`."""
        return "aws-kms"

    def __init__(self, settings: KmsSettings) -> None:
        """No I/O: the first call connects."""
        self._settings = settings
        self._connecting = asyncio.Lock()
        self._connections = AsyncExitStack()
        self._connected: KmsClient | None = None

    @override
    async def wrap(self, key: bytes, *, context: str) -> bytes:
        """KMS's Encrypt under the key for this kind of name."""
        client = await self._client()
        key_id = self._key_id(context)
        try:
            answer = await client.encrypt(
                KeyId=key_id, Plaintext=key, EncryptionContext={CONTEXT_NAME: context}
            )
        except (BotoCoreError, ClientError) as error:
            raise _translated(error, "Encrypt", key_id, context) from None
        return FORMAT + _bytes(answer["CiphertextBlob"])

    @override
    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """KMS's Decrypt, with the configured keys and no other, whatever the bytes name."""
        if not wrapped.startswith(FORMAT):
            raise CryptoError(f"the wrapped key {context} is not in a form of provider aws-kms")
        refused: CryptoError | None = None
        for key_id in self._key_ids(context):
            try:
                return await self._decrypt(wrapped, context, key_id)
            except CryptoError as error:
                refused = refused or error
        assert refused is not None, "there is one key id at least"
        raise refused

    @override
    async def is_current(self, wrapped: bytes, *, context: str) -> bool:
        """Whether it opens with the key that wraps now."""
        try:
            await self._decrypt(wrapped, context, self._key_id(context))
        except CryptoError:
            return False
        return True

    @override
    async def health(self) -> None:
        """Ask KMS whether the keys that wrap are there and enabled (DescribeKey)."""
        client = await self._client()
        for key_id in dict.fromkeys((self._key_id("bdk:"), self._settings.key_id)):
            try:
                answer = await client.describe_key(KeyId=key_id)
            except (BotoCoreError, ClientError) as error:
                raise _translated(error, "DescribeKey", key_id, "health") from None
            if answer["KeyMetadata"].get("Enabled") is not True:
                raise CryptoError(_refusal("use", key_id, _REMEDIES["DisabledException"]))

    @override
    async def close(self) -> None:
        """Close the connections."""
        self._connected = None
        await self._connections.aclose()

    async def _decrypt(self, wrapped: bytes, context: str, key_id: str) -> bytes:
        client = await self._client()
        try:
            answer = await client.decrypt(
                KeyId=key_id,
                CiphertextBlob=wrapped[len(FORMAT) :],
                EncryptionContext={CONTEXT_NAME: context},
            )
        except (BotoCoreError, ClientError) as error:
            raise _translated(error, "Decrypt", key_id, context) from None
        return _bytes(answer["Plaintext"])

    def _key_id(self, context: str) -> str:
        bdk_key_id = self._settings.bdk_key_id
        return bdk_key_id if bdk_key_id and context.startswith("bdk:") else self._settings.key_id

    def _key_ids(self, context: str) -> Sequence[str]:
        """Those that may have wrapped it; a key of its own for BDKs may have come later."""
        settings = self._settings
        ids = (self._key_id(context), settings.key_id, *settings.former_key_ids)
        return tuple(dict.fromkeys(ids))

    async def _client(self) -> KmsClient:
        async with self._connecting:
            if self._connected is None:
                self._connected = await self._connect()
            return self._connected

    async def _connect(self) -> KmsClient:
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
            max_pool_connections=CONNECTIONS,
        )
        try:
            client: KmsClient = await self._connections.enter_async_context(
                aioboto3.Session().client(
                    "kms",
                    region_name=self._settings.region,
                    endpoint_url=self._settings.endpoint_url,
                    config=config,
                )
            )
        except NoRegionError:
            message = "AWS KMS needs a region: set keys.kms_region"
            raise ConfigError(
                f"{message}.", fields=(FieldError("keys.kms_region", "is required"),)
            ) from None
        except BotoCoreError as error:
            raise _translated(error, "a client", self._settings.key_id, "health") from None
        return client

    def __repr__(self) -> str:
        return f"<AwsKmsProvider of {self._settings.key_id}>"


def _translated(
    error: Exception, operation: str, key_id: str, context: str
) -> CryptoError | UnavailableError:
    """AWS's error as one of ours; AWS's own text may name accounts and people and stays out."""
    if not isinstance(error, ClientError):
        kind = "no credentials are found" if isinstance(error, NoCredentialsError) else "no answer"
        return UnavailableError(f"AWS KMS cannot be asked for {operation}: {kind}.")
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _TRANSIENT or status >= 500 or status == 429:
        return UnavailableError(f"AWS KMS does not serve {operation} now ({_word(code)}).")
    if code in _DOES_NOT_OPEN:
        return CryptoError(
            f"the wrapped key {context} does not open under the AWS KMS key {key_id}: "
            "its bytes, its name or its KMS key are not those it was wrapped with"
        )
    if code in _NOT_ACCEPTED:
        remedy = "AWS does not accept glamd's credentials; correct them"
    else:
        remedy = _REMEDIES.get(code, "look its code up in AWS's reference of KMS")
    return CryptoError(_refusal(operation, key_id, remedy, code))


def _refusal(operation: str, key_id: str, remedy: str, code: str = "") -> str:
    named = f" ({_word(code)})" if code else ""
    return f"AWS KMS refuses {operation} with the key {key_id}{named}: {remedy}"


def _word(code: str) -> str:
    """An error code for people; what is none, out of an answer of somebody else, is not shown."""
    return code if code.isalnum() and len(code) <= 64 else "no error code"


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise UnavailableError("AWS KMS gave an answer that is none.")
    return value
