"""Healing: a short distillation of a cut model from the dense one."""
