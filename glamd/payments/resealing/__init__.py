"""Payment tokens for the re-encryption of `glamd.keys`: where they lie, how one is sealed anew.

`service` is the `SealedRows` of the keyring payment-tokens, `store` its SQL. How the job goes about
it is not known here.
"""
