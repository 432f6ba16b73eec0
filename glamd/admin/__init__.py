"""The operators' side: the admin unix socket of the daemon, and glamctl, which talks to it.

`server` and the `routes_*` files run in the daemon; `cli`, the `cli_*` files and `key_entry` are
glamctl and import nothing of the daemon's when they start, so that a command is quick; `client` is
the wire between the two. `migrate` runs the database's revisions and needs neither. No rule of a
capability is here.
"""
