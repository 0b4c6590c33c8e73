"""Checkpoints of GroupViT in all formats: recognised, described, converted and compared (`docs/conversion.md`)."""
