"""What must be computed at which step, found before any tensor exists."""
