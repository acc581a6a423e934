"""`RSFTModel` and its training step."""
