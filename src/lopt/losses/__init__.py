"""Local losses beside the published one, which is in `lopt.core.objective`."""
