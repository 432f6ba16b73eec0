"""Key providers: who holds the key-encryption key, behind one interface.

`interface` says what a provider does and bounds how long it may take; `local`, `aws_kms` and
`pkcs11` are the providers. Which keys there are, and under which names, is for the rooms above.
"""
