"""The stage `recover`: what pruning lost comes back without labels."""
