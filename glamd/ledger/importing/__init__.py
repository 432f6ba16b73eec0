"""Bringing over the accounts and transactions that the older credit service kept, references too.

`fields` reads older values and `merchant` is what every import of a merchant's money takes and
answers (billing's as well); `model` makes books that balance out of rows that may not, `service`
writes them, a merchant in one transaction. Reading the older database is for `glamctl`.
"""
