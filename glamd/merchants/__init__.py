"""Merchants: whose tokens, devices and credits they are.

`service` knows the rules (platforms, domains, what makes a merchant the same one again), `store`
the rows in both schemas. What a merchant owns lives in the rooms of those things.
"""
