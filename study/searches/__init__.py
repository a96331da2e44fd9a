"""Searches: trials that are stages of one tree, from settings to report."""
