"""The only room that imports libp2p; every remedy for it lives here, beside its reason."""
