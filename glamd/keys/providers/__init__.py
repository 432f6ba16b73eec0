"""Key providers: who holds the key-encryption key, behind one interface.

`interface` says what a provider does and bounds how long it may take; `local`, `aws_kms` and
`pkcs11` are the providers, `opening` makes those that the configuration names. Below them stand
`in_memory` (deriving for who cannot), `secret_files`, `hsm` and its `one_thread`. Which keys there
are, and under which names, is for the rooms above.
"""
