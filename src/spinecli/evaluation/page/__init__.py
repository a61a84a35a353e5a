"""The page that a person opens: records of what it says, and a template that says it."""
