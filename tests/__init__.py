"""The tests, as a package so that no installed distribution's own `tests` is found before it."""
