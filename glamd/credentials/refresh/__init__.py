"""Renewing platform tokens that OAuth lets expire, once at a time over all nodes.

`settings` says where a platform's token endpoint is and who we are there, `answers` what it may
say, `oauth` speaks to it; `store` claims what is due and commits the new pair; `renewer` renews one
token, `service` decides when. How a token is stored or read is the parent's.
"""
