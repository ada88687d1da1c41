"""Public helpers for those who test against a mesh: a fake engine, swarms, fixtures."""
