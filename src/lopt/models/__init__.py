"""Loading, saving and checking models."""
