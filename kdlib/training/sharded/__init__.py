"""Training of distillers whose parameters are sharded over processes, and their checkpoints."""
