"""Pure torch networks: the causal dual-stream transformer and the small codecs."""
