"""Measurements that a user can repeat. Imported by the command line only; nothing here is a timed test."""
