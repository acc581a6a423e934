"""How likely each given label is right."""
