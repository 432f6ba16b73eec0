"""Around the audit log: its SQL, walks along it, its pages, and its heads in a file.

Who writes rows is `glamd.payments.audit`; what a MAC covers and what a walk finds stands in the
pure files `audit_chain` and `audit_walk` beside it.
"""
