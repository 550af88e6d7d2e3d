"""Prompts drawn from a map, in two passes."""
