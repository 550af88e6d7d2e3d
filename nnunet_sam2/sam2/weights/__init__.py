"""SAM 2 weights by name: what is known of them, where they are kept, how they come there."""
