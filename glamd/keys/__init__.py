"""Keys: where they come from, how they are kept, and who may have one in the clear.

`providers` wrap keys under a key-encryption key that never enters the database; `keyrings` holds
the data keys in memory, by version; `lifecycle` rotates, retires and destroys versions, and
`reencryption` has the rows follow, as fast as `throttle` allows; `rewrapping` moves keys from one
provider to another; `key_sets` are base derivation keys, from which a device's initial key is
derived. SQL stands in files named `store`, but for the count in `sealed_rows`, whose tables are
others'.

Nothing here knows a card, a token or a transport. What DUKPT does with an initial key belongs to
`glamd.crypto`, and when a transaction key is used to `glamd.payments`.
"""
