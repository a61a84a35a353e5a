"""LEGEND: how deep LoRA reaches on each device, and with which ranks."""
