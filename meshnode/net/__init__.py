"""Everything that waits for the network, on trio."""
