"""Placeholder: names as the merged module will have them."""
from checks.fields import CannotKnow
from checks.finding import Finding
from checks.options import version as vllm_version
