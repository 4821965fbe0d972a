"""What is asked for: recipes, parameters and methods."""
