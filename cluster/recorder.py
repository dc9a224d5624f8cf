"""Placeholder: names as the merged module will have them."""
from vitals.recorded import FRESH_S, Recorded
from vitals.recorded import lows as read_lows
from vitals.recorded import read as read_recorded
