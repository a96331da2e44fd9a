"""Declared search spaces, a task each: which settings are searched, between which bounds, on which scale."""
