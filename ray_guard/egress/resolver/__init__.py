"""The guard's own resolver: every name server that a confined process asks is this one. See ``door`` and ``helper``."""
