"""The loop: SAM 2 labels, nnU-Net trains, its predictions prompt SAM 2, until the labels stop changing."""
