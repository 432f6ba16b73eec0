"""What `glamd dev` and the tests start by themselves, so that nothing need be installed as root.

Child processes (PostgreSQL), development certificates and the demo live here. The daemon that an
operator runs imports none of it: there, these parts are the operator's own.
"""
