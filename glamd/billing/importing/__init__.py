"""Bringing over the billing records and purchases that the older billing service kept, ids kept.

`model` reads the rows, `service` writes them, a merchant in one transaction. Credits are the
ledger's import's: nothing is granted here.
"""
