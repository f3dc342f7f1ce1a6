"""Floor 0: the values and contracts that all parts meet in. Nothing here knows a router, an expert or a model."""
