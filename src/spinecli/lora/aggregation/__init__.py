"""How a server makes one adapter of many: the rules by which LoRA factors of several devices are joined."""
