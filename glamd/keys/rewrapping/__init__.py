"""Rewrapping: from one key-encryption key or key provider to another, while everything runs.

`service` opens each key and wraps it anew; `store` has the rows. What is sealed under the keys is
not touched, and the keys themselves stay what they are: new data keys are for rotation.
"""
