"""HOW is it computed? What an engine is given, what it leaves behind, and the engines."""
