"""HTTP: what callers see on the api listener and on the workers' listener.

Routes, envelopes, problem answers, identities, limits and connection deadlines live here, and
here alone are HTTP statuses known. No SQL, no keys, no rule of a capability: a handler turns a
request into one call of a capability and its answer into JSON.

Read `routes` for the table that every route stands in, `middleware` for what happens to every
request, `connections` for what happens to every connection.
"""
