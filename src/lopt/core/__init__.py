"""The method. Read config, blocks, boundaries, attach; then routers and warmup."""
