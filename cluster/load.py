"""Placeholder: names as the merged module will have them."""
from vitals.load import RECORDER_S
from vitals.load import follow as follow_load
from vitals.load import launch as launch_model
