"""The operators' side: the admin unix socket of the daemon, and glamctl, which talks to it.

`server` and the `routes_*` files run in the daemon; `cli` and the `cli_*` files are glamctl and
import nothing of the daemon's, so that a command starts quickly; `client` is the wire between the
two. `migrate` runs the database's revisions and needs neither. No rule of a capability is here.
"""
