"""Circuit relay v2: connections through a third node, for hosts that can only dial out."""
