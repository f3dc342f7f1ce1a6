"""Running models: generation."""
