"""Methods, and backbones, side by side on the same cached features."""
