"""Merchants' trials and packs of credits, and the purchases that platforms collect the money of.

`service` is what others use, `model` the rules, `settlement` the one place where what a platform
says of a charge takes effect, `reconciliation` asks platforms, `webhooks` hears from them, `jobs`
lets time pass. Balances are the ledger's: credits are granted through its `apply_within` only.
HTTP, NATS and where a shop's access token comes from are others' business.
"""
