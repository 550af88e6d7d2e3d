"""The support library: labelled volumes as prompts, their augmentation, and matching to a query."""
