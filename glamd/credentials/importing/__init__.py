"""Bringing over the platform tokens that the older token service kept, ids and all.

`older` opens what that service sealed; `service` takes batches of its rows, `store` keeps them and
how far the import has come. Reading the older database is for `glamctl`.
"""
