"""A simulated fleet: its devices, who holds which data, and the clock on which their time passes."""
