"""Images: where they come from, how they are decoded and cut into tiles."""
