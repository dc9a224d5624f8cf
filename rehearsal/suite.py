"""Placeholder until tasks.py names rehearsal.stage."""

from rehearsal.stage import everything as everything
from rehearsal.stage import fast as fast
