"""Verifiable rewards, and the answers in a text."""
