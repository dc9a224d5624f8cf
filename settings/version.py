"""Placeholder: old names for cluster/repository.py."""
from cluster.repository import check_repository as check
from cluster.repository import repository_digest as digest
