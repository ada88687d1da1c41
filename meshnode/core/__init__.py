"""Pure and synchronous: `now` and `rng` are arguments, and nothing here waits."""
