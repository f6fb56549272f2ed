"""Weight space: recipes, plans and their execution."""
