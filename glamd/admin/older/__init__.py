"""glamctl's part in the imports of older services' rows.

Platform tokens: `rows` is what is read, out of a file too; `store` reads the older table; `run`
gives the rows to the daemon, which alone can open and seal them. Money is in the room `money`.
`meter` shows how far either is. Nothing here is a daemon's.
"""
