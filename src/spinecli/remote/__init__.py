"""Devices in processes and on machines of their own: what they are told, what they load, and how they are started."""
