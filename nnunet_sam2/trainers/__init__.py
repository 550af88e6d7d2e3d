"""The nnU-Net trainer that learns from labels by their confidence, and how nnU-Net finds it."""
