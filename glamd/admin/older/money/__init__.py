"""glamctl's part in the import of the older credit and billing services' rows.

`store` reads two older tables side by side, in one snapshot; `run` gives each merchant's rows to
the daemon and sums them up by itself; `totals` holds its sums to what the daemon says is there.
"""
