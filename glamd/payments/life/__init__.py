"""The end of payment tokens: their days' partitions, shredding, retention, erasure of a merchant.

`service` has the jobs that run on every node and `glamctl tokens purge`, `erasure` what takes a
merchant's cards away for good, `store` their SQL. That a token has expired or is revoked is told
elsewhere (`glamd.payments.tokens`); here is what becomes of its bytes.
"""
