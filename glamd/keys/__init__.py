"""Keys: where they come from, how they are kept, and who may have one in the clear.

`local` wraps keys under a key-encryption key that never enters the database; `keyrings` holds the
data keys in memory, by version; `ceremony` puts a base derivation key together from what people
typed; `service` imports base derivation keys and derives a device's initial key. SQL stands in
`store` only.

Nothing here knows a card, a token or a transport. What DUKPT does with an initial key belongs to
`glamd.crypto`, and when a transaction key is used to `glamd.payments`.
"""
