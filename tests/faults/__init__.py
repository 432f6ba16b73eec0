"""Fault runs: long, seeded, on a real daemon with its own database. `make faults` runs them all.

Each file is one fault: a function that breaks something, looks at what is left, and returns the
rows of the report. `tests/acceptance` runs the short forms of the same functions.
"""
