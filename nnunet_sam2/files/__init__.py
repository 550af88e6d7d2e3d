"""What is really in a file before it is believed: NIfTI headers and voxels, pictures, archives."""
