"""Recipes: what the user asks for, in a file or by flags, and the plan that follows from it."""
