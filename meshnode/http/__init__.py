"""The HTTP faces of a node: control API, metrics, and the answers it gives by itself."""
