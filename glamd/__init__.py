"""glamd: payment tokens, credits, billing and platform tokens for a commerce platform.

Only the version lives here. `glamd.app` puts the parts together; nothing else does.
"""

__version__ = "0.1.0"
