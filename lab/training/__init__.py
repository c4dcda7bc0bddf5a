"""Recipes that train the models; nothing here is imported by the nodes."""
