"""Widths of their own for every block: what each cut costs the model, and a budget spent where it costs least."""
