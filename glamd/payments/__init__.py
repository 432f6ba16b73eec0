"""Card payments: from a terminal's encrypted card to a token, and from a token back to the card.

What belongs to this capability stands together here: its rules, its actors, its SQL. How a request
arrives (MQTT, HTTP, a command line) does not. It shares nothing with the rest of glamd but the
kernel, `db`, `keys`, `errors` and `clock`, so that the card data environment can run apart.
"""
