"""Placeholder: names as the merged module will have them."""
from settings.names import DEFAULT_BASE_IMAGE, SECRETS
from settings.resolve import Settings
from settings.resolve import load as load_settings

ModelSettings = Settings
