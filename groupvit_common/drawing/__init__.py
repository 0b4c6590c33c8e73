"""Arrays in, pictures out: palettes and a canvas. Knows no result."""
