"""What all conversions have in common: which layers, on which inputs, what is measured and checked; and growth."""
