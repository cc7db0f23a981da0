"""What can be read from a recipe or a run."""
