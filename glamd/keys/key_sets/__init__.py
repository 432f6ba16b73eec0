"""Key sets: base derivation keys by name, how they come in, and the initial keys derived from them.

`ceremony` puts a key together from what people typed, `service` imports and derives, `store` has
the rows. Who holds a key is for `glamd.keys.providers`; data keys are for `glamd.keys.keyrings`.
"""
