"""Naive versions of the silent failures. Each runs without an error and is wrong; the checks must reject every one."""
