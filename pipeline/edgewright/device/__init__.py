"""What runs where a bundle arrives: verify it, unpack it, prove it. Nothing is trusted before."""
