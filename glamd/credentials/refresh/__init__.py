"""Renewing platform tokens that OAuth lets expire, once at a time over all nodes.

`oauth` speaks to a platform's token endpoint; `store` claims what is due and commits the new pair;
`service` decides when, and what a failure means. How a token is stored or read is the parent's.
"""
