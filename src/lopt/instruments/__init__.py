"""What measures memory and operations, and decides nothing."""
