"""Routed layers become dense, or get fewer or more experts."""
