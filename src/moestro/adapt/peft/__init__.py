"""Adapters as PEFT writes and reads them."""
