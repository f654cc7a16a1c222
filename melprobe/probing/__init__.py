"""Linear probes: what can be read from captured residuals, layer by layer. Never sees a model."""
