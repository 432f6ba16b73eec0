"""glamctl's part in the import of the older token service's rows.

`rows` is what is read, out of a file too; `store` reads the older table; `run` gives the rows to
the daemon, which alone can open and seal them, and shows how far it is. Nothing here is a daemon's.
"""
