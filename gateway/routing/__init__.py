"""Where a request goes: pure decisions, and what carries them out."""
