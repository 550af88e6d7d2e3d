"""Strategies that carry labels from support volumes to a query, and the fusion of what they answer."""
