"""Placeholder: names as the merged module will have them."""
from settings.models import ROOT
from settings.version import check as check_repository
from settings.version import digest as repository_digest
