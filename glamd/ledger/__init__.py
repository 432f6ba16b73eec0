"""Merchants' credits: accounts, transactions, and the only code that changes a balance.

`service` is what others use, `model` the rules, `actor` one merchant's decisions in their order,
`journal` many merchants' decisions in one commit, `store` the SQL, `verify` the proof that it all
adds up. Trials, packs and purchases are not here but in billing, which grants credits through
`apply_within`; HTTP, NATS and the publishing of events are transports' business.
"""
