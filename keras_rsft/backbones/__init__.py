"""Pretrained backbones by name, with their preprocessing inside."""
