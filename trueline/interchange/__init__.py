"""Other systems' files in and out: their configurations, checkpoints and data sets. Nothing here trains."""
