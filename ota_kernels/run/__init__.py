"""Doing it: a recipe's whole job, and the passes over tiles."""
