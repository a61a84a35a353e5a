"""LoRA adapters: factors, placement, cost, aggregation over different ranks, and rank plans."""
