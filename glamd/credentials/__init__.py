"""Platform tokens: the credentials of the merchants' shop platforms, sealed, and who touched them.

`model` says what one is, `sealing` how it is kept, `service` what can be done with it; `refresh`
renews those that OAuth lets expire, `importing` brings those that the older token service kept. SQL
stands in files named `store`. No HTTP route and no identity is known here: who may ask is decided
above, and comes in as an `Accessor` for the access log.
"""
