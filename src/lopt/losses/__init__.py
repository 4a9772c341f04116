"""Local losses, the rows they read, and the LM head."""
