"""What the training commands show: before a run, while it trains, and at its end."""
