"""Placeholder: names as the merged module will have them."""
from vitals.api import Answer, Metrics
from vitals.api import ask as ask_api
from vitals.api import generate as generate_token
from vitals.api import metrics as read_metrics
