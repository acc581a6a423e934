"""Decides which samples may update the weights."""
