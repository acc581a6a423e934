"""Folder, CSV file, TFDS or digits -> splits of samples with stable ids."""
