"""Shipped studies: one file an experiment; its header says the command, what it costs and what to expect."""
