"""Labelled slices inserted into the query as prompted frames of a video."""
