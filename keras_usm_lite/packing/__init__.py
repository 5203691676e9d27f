"""Bytes of a packed model: integer codes of a few bits, and N:M masks."""
