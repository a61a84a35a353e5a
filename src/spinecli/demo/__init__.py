"""The built-in model, the language it speaks, and texts and tasks made of it."""
