"""Checkpoint folders: lazy tensors, rule tables between two layouts, config fields, shards, tokenizer files."""
