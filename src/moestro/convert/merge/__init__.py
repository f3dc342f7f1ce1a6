"""Several dense models of one ancestor become one mixture."""
