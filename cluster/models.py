"""Placeholder: names as the merged module will have them."""
from settings.envfile import label as file_label
from settings.envfile import read as read_values
from settings.models import Model
from settings.models import find as find_model
from settings.models import known as known_models
