"""JWTs that are not believed any more, by their `jti` or by the `kid` that signed them.

`service` keeps them in memory, as fresh as a poll makes them; `store` has the rows. What a JWT is,
and who asks whether it is revoked, is for `glamd.http`.
"""
