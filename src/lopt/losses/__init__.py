"""Local losses beside the published one (`lopt.core.objective`), and the rows they read."""
