"""Proves that evidence is complete and unaltered, or says which record is not. Runs later, on any machine."""
