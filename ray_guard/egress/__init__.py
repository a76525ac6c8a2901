"""Egress: which calls are gated (rings), how one is answered (gate), and how bytes are counted (meter)."""
