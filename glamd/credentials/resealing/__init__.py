"""Platform tokens for the re-encryption of `glamd.keys`: where they lie, how one is sealed anew.

`service` is the `SealedRows` of the keyring platform-tokens, `store` its SQL. How the job goes
about it is not known here; what a secret is bound to is said by `glamd.credentials.sealing`.
"""
