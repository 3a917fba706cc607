"""Which code this is."""

from __future__ import annotations
