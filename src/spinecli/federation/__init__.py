"""Fine-tuning over a fleet of devices: fleet and clock, data, rounds, strategies, engines."""
