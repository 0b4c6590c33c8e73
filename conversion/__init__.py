"""Foreign GroupViT checkpoints: what they are, what they hold, and the way from each to each (`docs/conversion.md`)."""
