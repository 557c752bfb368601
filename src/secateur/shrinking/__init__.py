"""Shrink: fewer channels, heads and groups, and what stays refitted."""
