"""Placeholder: names as the merged module will have them."""
from checks.inspection import Inspection, foresee, gated, inspect, launch_line, proved
from checks.report import RULES, as_json, foretell, rule_names
from checks.report import tell as tell_inspection
