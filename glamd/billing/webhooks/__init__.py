"""Webhooks of platforms: kept first, answered at once, and given their effect afterwards, once.

`service` takes them and works through them, `store` has the rows. Who may send one and what it says
is the platform's to know, what it does to a purchase the settlement's.
"""
