"""Whole checkpoints, stops, guards, errors of the machine, records, secrets."""
