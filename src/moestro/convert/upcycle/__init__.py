"""Dense feed-forward layers become routed ones."""
