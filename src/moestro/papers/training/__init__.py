"""What comparisons do: their data, their training, their evaluation. A file per system, loaded when it is called."""
