"""A cohort of pictures as one video."""
