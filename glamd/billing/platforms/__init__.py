"""The platforms that collect the money of a purchase, behind one small interface.

`interface` is what billing knows of them, `shopify` and `custom` are the two that there are. What
a charge's status does to a purchase is not decided here.
"""
