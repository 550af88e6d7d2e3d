"""From a folder of images, some with labels, to an nnU-Net raw dataset with roles, patients and hashes."""
