"""The HTTP gateway: each request of a client goes to the peer that is best placed for it."""
