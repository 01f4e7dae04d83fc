"""Text to token samples. No torch here."""
