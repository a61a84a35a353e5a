"""Ways to choose the cohort of a round, behind one interface."""
